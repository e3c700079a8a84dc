"""Orders of the tokens of a grid: raster, tiles, space-filling curves, token-major. Each is a permutation with blocks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..grid import Grid
from .blocks import Blocks, even_blocks, of_sizes

CURVES = ("hilbert", "morton")


def raster(grid: Grid, block: int) -> tuple[np.ndarray | None, Blocks]:
    """Tokens as they come, t-major."""
    return None, even_blocks(grid.tokens, block)


def columns(grid: Grid, block: int) -> tuple[np.ndarray | None, Blocks]:
    """Token-major: all frames of one place, then the next place (Sparse VideoGen's temporal heads)."""
    order = np.arange(grid.tokens).reshape(grid.t, grid.h * grid.w).T.reshape(-1)
    return (None if grid.t == 1 else order), even_blocks(grid.tokens, block)


@lru_cache(maxsize=16)
def tiles(grid: Grid, tile: tuple[int, int, int]) -> tuple[np.ndarray, Blocks]:
    """Tile after tile, t-major among and inside tiles; tiles at the far borders are as small as they come."""
    keys, sizes = [], []
    for axis in range(3):
        at = np.arange(grid[axis])
        keys.append(at // tile[axis])
        sizes.append(np.bincount(at // tile[axis]))
    t, h, w = (len(size) for size in sizes)
    which = (keys[0][:, None, None] * h + keys[1][None, :, None]) * w + keys[2][None, None, :]
    order = np.argsort(which.reshape(-1), kind="stable")
    counts = sizes[0][:, None, None] * sizes[1][None, :, None] * sizes[2][None, None, :]
    assert counts.size == t * h * w
    return order, of_sizes(counts.reshape(-1))


def tile_counts(grid: Grid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles along each axis."""
    t, h, w = (-(-length // size) for length, size in zip(grid, tile, strict=True))
    return (t, h, w)


@lru_cache(maxsize=16)
def curve(grid: Grid, name: str, block: int) -> tuple[np.ndarray, Blocks]:
    """Tokens along a 3-D space-filling curve through the smallest cube of a power of two; places off the grid are skipped."""
    t, h, w = (axis.reshape(-1) for axis in np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"))
    bits = max(1, int(max(grid) - 1).bit_length())
    axes = np.stack([t, h, w]).astype(np.int64)
    if name == "hilbert":
        axes = _hilbert_transpose(axes, bits)
        place = _interleave(axes, bits)
    else:
        # x is the lowest bit
        place = _interleave(axes, bits)
    return np.argsort(place, kind="stable"), even_blocks(grid.tokens, block)


def _interleave(axes: np.ndarray, bits: int) -> np.ndarray:
    """One integer from the bits of three, the first axis highest."""
    out = np.zeros(axes.shape[1], dtype=np.int64)
    for bit in reversed(range(bits)):
        for axis in axes:
            out = (out << 1) | ((axis >> bit) & 1)
    return out


def _hilbert_transpose(axes: np.ndarray, bits: int) -> np.ndarray:
    """Coordinates → the transposed Hilbert index (Skilling, AIP Conf. Proc. 707, 2004: Gray code with rotations undone)."""
    x = axes.copy()
    count = len(x)
    bit = 1 << (bits - 1)
    while bit > 1:
        mask = bit - 1
        for i in range(count):
            flip = (x[i] & bit) != 0
            swap = np.where(flip, 0, (x[0] ^ x[i]) & mask)
            x[0] = np.where(flip, x[0] ^ mask, x[0] ^ swap)
            if i:
                x[i] ^= swap
        bit >>= 1
    for i in range(1, count):
        x[i] ^= x[i - 1]
    parity = np.zeros_like(x[0])
    bit = 1 << (bits - 1)
    while bit > 1:
        parity = np.where((x[count - 1] & bit) != 0, parity ^ (bit - 1), parity)
        bit >>= 1
    return x ^ parity
