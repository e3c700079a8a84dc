"""Video sparse attention in fp64: coarse attention among tiles, the best tiles per tile and head, fine attention in them.

Tiles of extra tokens are cut from each segment by itself. A segment that competes is chosen from like the grid, and every
tile of it raises the number of visits by one; every other segment is seen by all.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ultrazoo.spec import Segment
from ultrazoo.testing import Case, affine, plain

from .blocks import under
from .grouped_tokens import (
    Groups,
    answer,
    best,
    each_row,
    group_scores,
    heads_of,
    means,
    over_groups,
    real_ones,
    run_groups,
    tile_groups,
)


def segment_tiles(case: Case, size: int) -> tuple[Groups, Groups]:
    """Tiles of at most `size` extra tokens: of segments that compete, and of those that all see."""
    compete: Groups = []
    always: Groups = []
    if case.extra is not None:
        tokens = case.x.shape[1]
        segments = case.site.extra or (Segment("text", case.extra.k.shape[1]),)
        for segment in under(segments, "host", plain(case.spec)["extra_keys"]):
            (compete if segment.keys == "compete" else always).extend(run_groups(tokens, segment.length, size))
            tokens += segment.length
    return compete, always


def video_sparse(case: Case) -> Any:
    options = plain(case.spec)
    tile = options["image_tile"] if case.grid[0] == 1 and options["image_tile"] else options["tile"]
    tiles = tile_groups(case.grid, tile)
    compete, always = segment_tiles(case, math.prod(options["tile"]))
    q, k, v, real = heads_of(case)

    def chosen(row: list[float]) -> set[int]:
        there = real_ones(row[: len(tiles)])
        count = max(1, min(there, math.ceil(round((1 - options["sparsity"]) * there, 9))))
        return best(row, count + real_ones(row[len(tiles) :]))

    kept = each_row(group_scores(q, k, tiles, tiles + compete, real), chosen)
    fine = over_groups(case, q, k, v, real, kept, tiles, tiles + compete)
    if options["gate"] == "none":
        return answer(case, fine)
    # the coarse softmax runs over every tile alike
    everything = tiles + compete + always
    coarse = group_scores(q, k, tiles, everything, real).softmax(-1) @ means(v, everything, real)
    spread = torch.zeros(q.shape, dtype=q.dtype)
    for i, group in enumerate(tiles):
        spread[:, group] = coarse[:, :, i, None].transpose(1, 2)
    gate = affine(case.weights, "far.gate", case.x)
    return answer(case, fine + gate * spread.flatten(2))
