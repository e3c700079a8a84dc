"""Sliding tile attention (STA, arXiv:2502.04507), tile by tile: a key tile is seen when it is near the clamped centre on all axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, plain

from .masked import masked, product_mask

IMAGE_TILES = {384: (1, 16, 24), 128: (1, 16, 8), 64: (1, 8, 8), 16: (1, 4, 4)}


def tile_of(options: dict[str, Any], grid: tuple[int, int, int]) -> tuple[int, ...]:
    """An image takes a flat tile of the same volume."""
    t, h, w = options["tile"]
    return IMAGE_TILES[t * h * w] if grid[0] == 1 and t > 1 else (t, h, w)


def seen_along(length: int, tile: int, window: Any) -> list[list[int]]:
    """The keys of every token of one axis."""
    count = (length + tile - 1) // tile
    if window == "full" or window >= count:
        return [list(range(length))] * length
    half, rows = window // 2, []
    for token in range(length):
        centre = min(max(token // tile, half), count - 1 - half)
        near = [b for b in range(count) if abs(b - centre) <= half]
        rows.append([p for p in range(length) if p // tile in near])
    return rows


def windows_of_heads(options: dict[str, Any], heads: int) -> list[list[Any]]:
    """The window of every head."""
    given = options["window"]
    if isinstance(given, list):
        return given if isinstance(given[0], list) else [given] * heads
    out: list[Any] = [None] * heads
    for key, window in given.items():
        for part in key.split(","):
            first, _, last = part.strip().partition("-")
            for head in range(int(first), int(last or first) + 1):
                out[head] = window
    return out


def sliding_tile(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, one dense mask per head."""
    options = plain(case.spec)
    tile = tile_of(options, case.grid)
    masks = []
    for window in windows_of_heads(options, case.site.heads):
        axes = [seen_along(n, t, m) for n, t, m in zip(case.grid, tile, window, strict=True)]
        masks.append(product_mask(axes))
    return masked(case, torch.stack(masks))
