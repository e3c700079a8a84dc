"""Key blocks that hold a token of a range: sinks that are not whole frames (Sol-Attn, arXiv 2607.24027)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import Problem
from ...spec import Site, option
from .orders import Place
from .selectors import Bounds, SelectorSpec


@dataclass(frozen=True, kw_only=True)
class TokensSpec(SelectorSpec):
    """Key blocks that hold a token of a range of the grid, for every query block: the range is rounded outward."""

    name: ClassVar[str] = "tokens"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    start: int = option(0, "first token, t-major", ge=0)
    count: int = option(1, "tokens of the range", ge=1)

    def problems(self, site: Site) -> list[Problem]:
        if self.start + self.count > site.tokens:
            rule = f"tokens {self.start} to {self.start + self.count - 1} of a grid of {site.tokens}"
            fix = f"start + count at most {site.tokens}"
            return [Problem("count" if self.start < site.tokens else "start", rule, fix)]
        return []

    def _holds(self, place: Place) -> np.ndarray:
        """(selectable,) bool."""
        inside = np.zeros(place.grid.tokens, dtype=bool)
        inside[self.start : self.start + self.count] = True
        if place.order is not None:
            inside = inside[place.order]
        return np.logical_or.reduceat(inside, np.asarray(place.keys.starts[: place.selectable]))

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        return np.broadcast_to(self._holds(place)[None, None], (1, hi - lo, place.selectable))

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        total = place.queries.tokens * int(place.keys.sizes[: place.selectable][self._holds(place)].sum())
        return Bounds(total, total, total)
