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
        if place.order is not None or place.whole[0] != place.whole[1]:
            rule = "the map is one of raster order with blocks of one size"
            return [Problem("", rule, "use order: {name: raster, block: 128}")]
        if size < place.queries.largest and site.grid.t > 1:
            rule = f"blocks of {place.queries.largest} tokens are larger than a frame of {size}"
            return [Problem("", rule, f"use order.block of at most {size}")]
        return []

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        size = place.grid.h * place.grid.w
        starts = np.asarray(place.queries.starts[lo : hi + 1], dtype=np.int64)
        cells = _cells(place.grid, place.keys.starts[: place.grid_keys + 1])
        # kept blocks are runs: +1 where one begins, -1 behind its end; a block lies in four runs at most
        steps = np.zeros((hi - lo, place.grid_keys + 1), dtype=np.int8)
        # a block of queries touches two frames at most, as it is no larger than a frame
        for frame in (starts[:-1] // size, (starts[1:] - 1) // size):
            low = np.maximum(starts[:-1] - frame * size, 0)
            high = np.minimum(starts[1:] - 1 - frame * size, size - 1)
            row, first, last = self._runs(frame, low, high, np.diff(starts), size, cells)
            flat, row = steps.reshape(-1), row * steps.shape[1]
            np.add.at(flat, row + cells.block[first], np.int8(1))
            np.add.at(flat, row + cells.block[last] + 1, np.int8(-1))
        return (np.cumsum(steps[:, :-1], axis=1, dtype=np.int8) > 0)[None]

    def _runs(
        self, frame: np.ndarray, low: np.ndarray, high: np.ndarray, tokens: np.ndarray, size: int, cells: _Cells
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs of cells in whose columns the band of rows low..high of `frame` is dense: row, first and last cell.

        A cell inside the full columns is dense and one outside is not: only the two at their ends are counted.
        """
        apart = np.abs(frame[:, None] - np.arange(cells.frames)[None, :])
        width, kept = self._bands(apart, size)
        least = tokens // 3 + 1
        kept &= (high - low + 1 >= least)[:, None] & (2 * width + 1 >= least[:, None])
        row, to = np.nonzero(kept)
        width, low, high, least = width[row, to], low[row], high[row], least[row]
        full = np.maximum(low + least - 1 - width, 0), np.minimum(high - least + 1 + width, size - 1)
        some = full[0] <= full[1]
        row, to, width, low, high = (z[some] for z in (row, to, width, low, high))
        full = full[0][some], full[1][some]
        first, last = (np.searchsorted(cells.borders, to * size + end, side="right") - 1 for end in full)
        dense = []
        for cell in (first, last):
            nonzero = _overlap(low - width, high + width, cells, cell)
            dense.append(5 * _overlap(*full, cells, cell) > 3 * nonzero)
        first, last = first + ~dense[0], last - ~dense[1]
        some = first <= last
        return row[some], first[some], last[some]

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
    """Pieces of key blocks inside one frame, in order: first tokens, first and last column in the frame, key block."""

    frames: int
    borders: np.ndarray
    low: np.ndarray
    high: np.ndarray
    block: np.ndarray


@lru_cache(maxsize=4)
def _cells(grid: Grid, starts: tuple[int, ...]) -> _Cells:
    size = grid.h * grid.w
    borders = np.union1d(np.asarray(starts), np.arange(0, grid.tokens + 1, size))
    first, end = borders[:-1], borders[1:]
    block = np.searchsorted(np.asarray(starts), first, side="right") - 1
    return _Cells(grid.t, first, first % size, (end - 1) % size, block)


def _overlap(low: np.ndarray, high: np.ndarray, cells: _Cells, cell: np.ndarray) -> np.ndarray:
    """Columns of each `cell` inside low..high."""
    return np.maximum(np.minimum(high, cells.high[cell]) - np.maximum(low, cells.low[cell]) + 1, 0)
