"""The sliding window of tiles (STA, arXiv 2502.04507) as a static selector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import Problem
from ...grid import AXES
from ...spec import Site, option
from .orders import Place
from .selectors import Bounds, SelectorSpec


@dataclass(frozen=True, kw_only=True)
class SlidingSpec(SelectorSpec):
    """Tiles within half a window of the query's tile on every axis; at a border the window moves inwards."""

    name: ClassVar[str] = "sliding"
    source: ClassVar[str] = "STA, arXiv 2502.04507"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    beside: ClassVar[Mapping[str, Any]] = {"order": {"name": "tiles"}}

    window: tuple[int, ...] = option((3, 3, 3), "tiles (T, H, W); odd, or at least as many as the axis has", ge=1)

    def problems(self, site: Site) -> list[Problem]:
        if len(self.window) != 3:
            return [Problem("window", f"got {len(self.window)} numbers", "give three: tiles along (T, H, W)")]
        return []

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        if place.tiles is None:
            return [Problem("", "a window of tiles needs tiles", "use order: {name: tiles, tile: …}")]
        found = []
        for axis, size, count in zip(AXES, self.window, place.tiles, strict=True):
            if size % 2 == 0 and size < count:
                rule = f"a window of {size} tiles along {axis} has no middle"
                odd = f"{size - 1}, {size + 1}," if size + 1 < count else f"{size - 1}"
                found.append(Problem("window", rule, f"use {odd} or {count} for the whole axis"))
        return found

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        assert place.tiles is not None
        rows = np.unravel_index(np.arange(lo, hi), place.tiles)
        columns = np.unravel_index(np.arange(place.grid_keys), place.tiles)
        out = np.ones((hi - lo, place.grid_keys), dtype=bool)
        for row, column, size, count in zip(rows, columns, self.window, place.tiles, strict=True):
            first, end = _span(row, size, count)
            out &= (column >= first[:, None]) & (column < end[:, None])
        return out[None]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        """Pairs along each axis, multiplied: tiles are boxes, and so are windows."""
        assert place.tile is not None
        assert place.tiles is not None
        total = 1
        for length, tile, size, count in zip(place.grid, place.tile, self.window, place.tiles, strict=True):
            starts = np.minimum(np.arange(count + 1) * tile, length)
            first, end = _span(np.arange(count), size, count)
            total *= int(np.diff(starts) @ (starts[end] - starts[first]))
        return Bounds(total, total, total)


def _span(at: np.ndarray, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First tile and end of the window around each of `at`, along an axis of `count` tiles."""
    if size >= count:
        return np.zeros_like(at), np.full_like(at, count)
    first = np.clip(at - size // 2, 0, count - size)
    return first, first + size
