"""NABLA in fp64: top-p of block scores, united with a sliding window of tiles."""

from __future__ import annotations

from typing import Any

import torch

from ultrazoo.testing import Case, plain

from .grouped_tokens import answer, each_row, group_scores, heads_of, heaviest, over_groups, tile_groups


def in_window(a: int, b: int, count: int, window: int) -> bool:
    """STA on one axis: the window stays inside the axis; one as long as the axis is the whole of it."""
    if window >= count:
        return True
    half = window // 2
    centre = min(max(a, half), count - 1 - half)
    return abs(b - centre) <= half


def nabla(case: Case) -> Any:
    options = plain(case.spec)
    tile = [min(size, length) for size, length in zip(options["tile"], case.grid, strict=True)]
    tiles = tile_groups(case.grid, tile)
    counts = [-(-length // size) for size, length in zip(tile, case.grid, strict=True)]
    places = [(t, h, w) for t in range(counts[0]) for h in range(counts[1]) for w in range(counts[2])]
    q, k, v, real = heads_of(case)
    kept = each_row(group_scores(q, k, tiles, tiles, real), lambda row: heaviest(row, options["p"]))
    if options["window"] is not None:
        near = [
            [all(in_window(a[i], b[i], counts[i], options["window"][i]) for i in range(3)) for b in places]
            for a in places
        ]
        kept = kept | torch.tensor(near)
    return answer(case, over_groups(case, q, k, v, real, kept, tiles, tiles))
