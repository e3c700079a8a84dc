"""Radial attention's map (arXiv 2506.19852): bands between frames that halve in density each time their distance doubles.

Tokens k of frame i and l of frame j, d = |i - j|, s tokens per frame, L = 2^bits(s) / 2^bits(d): ``|k - l| <= w`` with
``w = s`` for d <= 1, else ``max(decay · L, width)``; frame pairs with ``L < width`` keep every ``floor(width / L)``-th d. A
block is kept where, for some pair of frames, more than 60 % of its non-empty columns are more than a third full. Both sets of
columns are intervals, so the map is arithmetic. Departure: a short last block counts by the tokens it holds; the source drops
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from ...errors import Problem
from ...grid import Grid
from ...spec import Site, option
from .orders import Place
from .selectors import SelectorSpec


@dataclass(frozen=True, kw_only=True)
class RadialMapSpec(SelectorSpec):
    """Bands between frames, as blocks of raster order."""

    name: ClassVar[str] = "radial"
    source: ClassVar[str] = "Radial Attention, arXiv 2506.19852"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    decay: float = option(0.2, "width of a band against L; larger is denser", gt=0)
    width: int = option(128, "narrowest band, and where thinning begins, in tokens", ge=1)
    sink: int = option(1, "first frames that all see", ge=0)

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        size = site.grid.h * site.grid.w
        if place.order is not None or place.queries.largest != place.keys.largest:
            rule = "the map is one of raster order with blocks of one size"
            return [Problem("", rule, "use order: {name: raster, block: 128}")]
        if size < place.queries.largest and site.grid.t > 1:
            rule = f"blocks of {place.queries.largest} tokens are larger than a frame of {size}"
            return [Problem("", rule, f"use order.block of at most {size}")]
        return []

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        size = place.grid.h * place.grid.w
        starts = np.asarray(place.queries.starts, dtype=np.int64)
        cells = _cells(place.grid, place.keys.starts[: place.grid_keys + 1])
        out = np.zeros((hi - lo, place.grid_keys), dtype=bool)
        # a block of queries touches two frames at most, as it is no larger than a frame
        first = starts[lo:hi] // size
        last = (starts[lo + 1 : hi + 1] - 1) // size
        for frame in (first, last):
            low = np.maximum(starts[lo:hi] - frame * size, 0)
            high = np.minimum(starts[lo + 1 : hi + 1] - 1 - frame * size, size - 1)
            kept = self._dense(frame, low, high, starts[lo + 1 : hi + 1] - starts[lo:hi], size, cells)
            # cells stand in the order of key blocks: a block's cells are neighbours
            out |= np.logical_or.reduceat(kept, cells.first_of_block, axis=1)
        return out[None]

    def _dense(
        self, frame: np.ndarray, low: np.ndarray, high: np.ndarray, tokens: np.ndarray, size: int, cells: _Cells
    ) -> np.ndarray:
        """Bool (rows, cells): is the band of rows low..high of `frame` dense in the columns of each cell?"""
        apart = np.abs(frame[:, None] - np.arange(cells.frames)[None, :])
        width, kept = self._bands(apart, size)
        width, kept = width[:, cells.frame], kept[:, cells.frame]
        rows = (high - low + 1)[:, None]
        least = (tokens // 3 + 1)[:, None]
        nonzero = _overlap(low[:, None] - width, high[:, None] + width, cells)
        full = _overlap(low[:, None] + least - 1 - width, high[:, None] - least + 1 + width, cells)
        full = np.where((rows >= least) & (2 * width + 1 >= least), full, 0)
        return kept & (nonzero > 0) & (5 * full > 3 * nonzero)

    def _bands(self, apart: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Half-width in tokens of the band between frames so far apart, and whether it is kept."""
        bits = np.ceil(np.log2(apart + 1)).astype(np.int64)
        level = 2.0 ** int(size).bit_length() / 2.0**bits
        width = np.where(apart <= 1, size, np.floor(np.maximum(self.decay * level, self.width))).astype(np.int64)
        every = np.maximum(1, self.width // level).astype(np.int64)
        kept = (level >= self.width) | (apart % every == 0)
        sink = np.arange(apart.shape[1])[None, :] < self.sink
        return np.where(sink, 2 * size, width), kept | sink


@dataclass(frozen=True)
class _Cells:
    """Pieces of key blocks inside one frame, in order: frame, first and last column in the frame."""

    frames: int
    frame: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first_of_block: np.ndarray


@lru_cache(maxsize=4)
def _cells(grid: Grid, starts: tuple[int, ...]) -> _Cells:
    size = grid.h * grid.w
    borders = np.union1d(np.asarray(starts), np.arange(0, grid.tokens + 1, size))
    frame = borders[:-1] // size
    first = np.searchsorted(borders, np.asarray(starts[:-1]))
    return _Cells(grid.t, frame, borders[:-1] - frame * size, borders[1:] - 1 - frame * size, first)


def _overlap(low: np.ndarray, high: np.ndarray, cells: _Cells) -> np.ndarray:
    """Columns of each cell inside low..high."""
    return np.maximum(np.minimum(high, cells.high) - np.maximum(low, cells.low) + 1, 0)
