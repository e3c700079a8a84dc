"""Radial attention in fp64: the band of every pair of frames, token by token, shrunk to blocks by loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, real_keys, scores


def bits(n: int) -> int:
    """Binary digits of n: 0 for 0, floor(log2 n) + 1 otherwise."""
    count = 0
    while n:
        n //= 2
        count += 1
    return count


def frame_band(i: int, j: int, size: int, options: dict[str, Any]) -> list[list[bool]]:
    """May the token at row k of frame i see the token at column l of frame j?"""
    apart = abs(i - j)
    if j < options["sink"]:
        return [[True] * size for _ in range(size)]
    level = 2 ** bits(size) / 2 ** bits(apart)
    least = options["width"]
    width = size if apart <= 1 else max(options["decay"] * level, least)
    kept = level >= least or apart % int(least // level) == 0
    return [[kept and abs(k - col) <= width for col in range(size)] for k in range(size)]


def block_map(grid: tuple[int, int, int], options: dict[str, Any]) -> list[list[bool]]:
    """A block of some frame pair is kept when more than 60 % of its columns that are not empty are more than a third full."""
    frames, size = grid[0], grid[1] * grid[2]
    tokens, block = frames * size, options["block"]
    count = -(-tokens // block)
    bands = {(i, j): frame_band(i, j, size, options) for i in range(frames) for j in range(frames)}
    kept = [[False] * count for _ in range(count)]
    for r in range(count):
        rows = range(r * block, min((r + 1) * block, tokens))
        for c in range(count):
            columns = range(c * block, min((c + 1) * block, tokens))
            for i in sorted({row // size for row in rows}):
                for j in sorted({col // size for col in columns}):
                    density = [
                        sum(bands[i, j][row % size][col % size] for row in rows if row // size == i) / len(rows)
                        for col in columns
                        if col // size == j
                    ]
                    some = [d for d in density if d > 0]
                    dense = [d for d in density if d > 1 / 3]
                    if some and len(dense) / len(some) > 0.6:
                        kept[r][c] = True
    return kept


def token_mask(grid: tuple[int, int, int], options: dict[str, Any]) -> Tensor:
    """Bool (N, N)."""
    kept = torch.tensor(block_map(grid, options))
    of = torch.arange(grid[0] * grid[1] * grid[2]) // options["block"]
    return kept[of][:, of]


def radial(case: Case) -> Any:
    options = plain(case.spec)
    place = grid_of(case.grid)
    q = case.host.split(case.host.raw(case.x, "q"), "q", place)
    k = case.host.split(case.host.raw(case.x, "k"), "k", place)
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    allowed = token_mask(case.grid, options)[None, None]
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], dim=1), torch.cat([v, case.extra.v], dim=1)
        allowed = torch.cat(
            [allowed, torch.ones(1, 1, allowed.shape[2], case.extra.k.shape[1], dtype=torch.bool)], dim=-1
        )
    y = case.host.out(attend(scores(q, k, allowed & real_keys(case)), v))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
