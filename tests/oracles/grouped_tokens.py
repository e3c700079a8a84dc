"""Groups of tokens in fp64, by loops: their means, scores of pairs of groups, which pairs are kept, and attention over them.

A group is a list of token indices; extra tokens are numbered behind the grid's and stand in groups of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, real_keys, scores

Groups = list[list[int]]


def tile_groups(grid: Sequence[int], tile: Sequence[int]) -> Groups:
    """Tokens of each tile, tiles t-major; smaller ones at the far borders."""
    found: dict[tuple[int, ...], list[int]] = {}
    token = 0
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                place = (t // tile[0], h // tile[1], w // tile[2])
                found.setdefault(place, []).append(token)
                token += 1
    return [found[place] for place in sorted(found)]


def run_groups(first: int, count: int, size: int) -> Groups:
    """Consecutive tokens from `first` on."""
    return [list(range(i, min(i + size, first + count))) for i in range(first, first + count, size)]


def heads_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, N, heads, D), k and v (B, N + M, heads, D), and which keys are real, bool (B, N + M)."""
    place = grid_of(case.grid)
    q = case.host.split(case.host.raw(case.x, "q"), "q", place)
    k = case.host.split(case.host.raw(case.x, "k"), "k", place)
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], dim=1), torch.cat([v, case.extra.v], dim=1)
    return q, k, v, real_keys(case)[:, 0, 0]


def means(z: Tensor, groups: Groups, real: Tensor | None = None) -> Tensor:
    """(B, heads, groups, D): mean over the real tokens of each group, zero where there is none."""
    rows = []
    for group in groups:
        part = z[:, group]
        weight = torch.ones(part.shape[:2], dtype=z.dtype) if real is None else real[:, group].to(z.dtype)
        total = (part * weight[..., None, None]).sum(1)
        rows.append(total / weight.sum(1).clamp(min=1)[:, None, None])
    return torch.stack(rows, dim=2)


def group_scores(q: Tensor, k: Tensor, query_groups: Groups, key_groups: Groups, real: Tensor) -> Tensor:
    """(B, heads, query groups, key groups): ``q̄ · k̄ / sqrt(D)`` of real tokens, minus infinity without a real key."""
    found = (
        means(q, query_groups, real[:, : q.shape[1]])
        @ means(k, key_groups, real).transpose(-1, -2)
        / math.sqrt(q.shape[-1])
    )
    some = torch.stack([real[:, group].any(1) for group in key_groups], dim=1)
    return found.masked_fill(~some[:, None, None], float("-inf"))


def best(row: Sequence[float], count: int) -> set[int]:
    """Indices of the `count` largest; ties by the lower index."""
    return set(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])


def real_ones(row: Sequence[float]) -> int:
    """How many groups of a row have a real key."""
    return sum(value > float("-inf") for value in row)


def heaviest(row: Sequence[float], mass: float) -> set[int]:
    """The fewest indices whose softmax reaches `mass`; at least one."""
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    total, reached, kept = sum(weights), 0.0, set()
    for i in sorted(range(len(row)), key=lambda i: (-weights[i], i)):
        if kept and reached >= mass:
            break
        kept.add(i)
        reached += weights[i] / total
    return kept


def each_row(found: Tensor, choose: object) -> Tensor:
    """`choose(row)` → kept indices, for every row of scores: bool of the same shape. Groups without a real key never are."""
    kept = torch.zeros(found.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in found.shape[:3])).tolist():
        row = found[tuple(place)].tolist()
        for i in choose(row):  # type: ignore[operator]
            kept[(*place, i)] = row[i] > float("-inf")
    return kept


def over_groups(
    case: Case, q: Tensor, k: Tensor, v: Tensor, real: Tensor, kept: Tensor, query_groups: Groups, key_groups: Groups
) -> Tensor:
    """Softmax over the real tokens of the kept groups and over all real extra tokens: (B, N, heads*D)."""
    allowed = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    allowed[..., q.shape[1] :] = True
    for i, rows in enumerate(query_groups):
        for j, columns in enumerate(key_groups):
            block = kept[:, :, i, j, None, None].expand(kept.shape[0], q.shape[2], len(rows), len(columns))
            allowed[:, :, torch.tensor(rows)[:, None], torch.tensor(columns)] = block
    return attend(scores(q, k, allowed & real[:, None, None]), v)


def answer(case: Case, heads: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Through the output projection; with the extra rows, which see everything, iff there are any."""
    y = case.host.out(heads)
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
