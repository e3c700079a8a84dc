"""Video sparse attention in fp64: coarse attention among tiles, the best tiles per tile and head, fine attention in them."""

from __future__ import annotations

import math
from typing import Any

import torch

from ultrazoo.testing import Case, affine, plain

from .grouped_tokens import answer, best, each_row, group_scores, heads_of, means, over_groups, run_groups, tile_groups


def video_sparse(case: Case) -> Any:
    options = plain(case.spec)
    tile = options["image_tile"] if case.grid[0] == 1 and options["image_tile"] else options["tile"]
    tokens = case.x.shape[1]
    tiles = tile_groups(case.grid, tile)
    q, k, v, real = heads_of(case)
    found = group_scores(q, k, tiles, tiles, real)
    count = max(1, min(len(tiles), math.ceil(round((1 - options["sparsity"]) * len(tiles), 9))))
    kept = each_row(found, lambda row: best(row, count))
    fine = over_groups(case, q, k, v, real, kept, tiles, tiles)
    if options["gate"] == "none":
        return answer(case, fine)
    # the coarse softmax runs over every tile, chunks of extra tokens included, alike
    more = run_groups(tokens, k.shape[1] - tokens, math.prod(options["tile"]))
    everything = tiles + more
    coarse = group_scores(q, k, tiles, everything, real).softmax(-1) @ means(v, everything, real)
    spread = torch.zeros(q.shape, dtype=q.dtype)
    for i, group in enumerate(tiles):
        spread[:, group] = coarse[:, :, i, None].transpose(1, 2)
    gate = affine(case.weights, "far.gate", case.x)
    return answer(case, fine + gate * spread.flatten(2))
