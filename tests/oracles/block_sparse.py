"""Block-sparse attention in fp64: orders, selectors and far fields as dense masks over groups of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, affine, plain

from .grouped_tokens import (
    Groups,
    answer,
    best,
    each_row,
    group_scores,
    heads_of,
    heaviest,
    means,
    over_groups,
    run_groups,
    tile_groups,
)


def blocks_of(order: dict[str, Any], grid: tuple[int, int, int]) -> tuple[Groups, Groups]:
    """Tokens of the query blocks and of the key blocks."""
    if order["name"] == "tiles":
        tile = order["image_tile"] if grid[0] == 1 and order["image_tile"] else order["tile"]
        tiles = tile_groups(grid, tile)
        return tiles, tiles
    tokens, size = math.prod(grid), grid[1] * grid[2]
    at = list(range(tokens))
    if order["name"] == "columns":
        at = [t * size + place for place in range(size) for t in range(grid[0])]
    else:
        assert order["name"] == "raster"
    sizes = order["block"] if isinstance(order["block"], list) else [order["block"]] * 2
    return tuple([[at[i] for i in group] for group in run_groups(0, tokens, n)] for n in sizes)  # type: ignore[return-value]


def chosen(
    selector: dict[str, Any], case: Case, q: Tensor, k: Tensor, real: Tensor, rows: Groups, columns: Groups
) -> Tensor:
    """Bool (B, heads, query blocks, key blocks)."""
    shape = (q.shape[0], q.shape[2], len(rows), len(columns))
    if selector["name"] == "all":
        return torch.ones(shape, dtype=torch.bool)
    if selector["name"] == "union":
        parts = [chosen(one, case, q, k, real, rows, columns) for one in selector["of"]]
        return torch.stack(parts).any(0)
    if selector["name"] == "band":
        assert len(rows) == len(columns)
        near = [[abs(i - j) <= selector["width"] for j in range(len(columns))] for i in range(len(rows))]
        return torch.tensor(near).expand(shape)
    if selector["name"] == "sink":
        first = selector["frames"] * case.grid[1] * case.grid[2]
        return torch.tensor([any(token < first for token in group) for group in columns]).expand(shape)
    assert selector["name"] == "pooled"
    assert selector["runs"] == [1, 1]
    rule = selector["rule"]
    found = group_scores(q, k, rows, columns, real)
    if rule["name"] == "topp":
        return each_row(found, lambda row: heaviest(row, rule["p"]))
    count = rule["count"] or max(1, math.ceil(round(rule["share"] * len(columns), 9)))
    return each_row(found, lambda row: best(row, count))


def block_sparse(case: Case) -> Any:
    options = plain(case.spec)
    rows, columns = blocks_of(options["order"], case.grid)
    q, k, v, real = heads_of(case)
    kept = chosen(options["selector"], case, q, k, real, rows, columns)
    near = over_groups(case, q, k, v, real, kept, rows, columns)
    if options["far"]["name"] == "drop":
        return answer(case, near)
    assert options["far"]["name"] == "coarse"
    tokens = case.x.shape[1]
    size = math.prod(options["order"]["tile"])
    everything = columns + run_groups(tokens, k.shape[1] - tokens, size)
    coarse = group_scores(q, k, rows, everything, real).softmax(-1) @ means(v, everything, real)
    spread = torch.zeros(q.shape, dtype=q.dtype)
    for i, group in enumerate(rows):
        spread[:, group] = coarse[:, :, i, None].transpose(1, 2)
    gate = affine(case.weights, "far.gate", case.x)
    return answer(case, near + gate * spread.flatten(2))
