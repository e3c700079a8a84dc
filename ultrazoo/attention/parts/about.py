"""Windows of about so many tokens at every size: their number is chosen from the length of the axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import Problem
from ...grid import Grid, per_axis
from ...ops.partition import Cuts
from ...ops.runs import balanced, strided
from ...spec import Site, option
from .base import LayoutSpec, ShiftSpec


def windows_for(length: int, wanted: int) -> int:
    """Windows on an axis of `length` tokens so that each has about `wanted`; 0 means one window.

    The divisor of the length that brings windows nearest, by ratio, the longer of two as near; where every divisor misses
    by more than a factor of two, as at a prime length, the nearest number of uneven windows.
    """
    if wanted == 0 or wanted >= length:
        return 1
    # products of whole numbers alone, which a compiler can follow
    small, n = [], 1
    while n * n <= length:
        if length % n == 0:
            small.append(n)
        n += 1
    # near / far is how near windows of length / best come to `wanted`
    best, near, far = 1, wanted, length
    for n in (*small, *(length // n for n in reversed(small))):
        low, high = min(length, n * wanted), max(length, n * wanted)
        if low * far > near * high:
            best, near, far = n, low, high
    return best if far <= 2 * near else (2 * length + wanted) // (2 * wanted)


@dataclass(frozen=True, kw_only=True)
class AboutSpec(LayoutSpec):
    """Windows of about so many tokens per axis, of equal size where a divisor of the axis comes near: neighbours, or every
    n-th token of the whole axis."""

    name: ClassVar[str] = "about"
    source: ClassVar[str] = "a rule for T3-Video, arXiv 2512.13492, at sizes it has no table for"
    minimal: ClassVar[Mapping[str, Any]] = {"size": [8, 8]}
    fixed: ClassVar[str] = "layout about chooses the number of windows from the divisors of plain ints"

    size: int | tuple[int, ...] = option(doc="tokens per window and axis to aim at; 0 leaves an axis whole", ge=0)
    form: Literal["contiguous", "strided"] = option("contiguous", "a window is neighbours, or tokens n apart")

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.size, tuple) and len(self.size) not in (2, 3):
            return [Problem("size", f"got {len(self.size)} numbers; one or two mean (H, W), three (T, H, W)")]
        return []

    def counts(self, grid: Grid) -> tuple[int, int, int]:
        """Windows per axis at `grid`."""
        t, h, w = (windows_for(n, wanted) for n, wanted in zip(grid, per_axis(self.size, whole=0), strict=True))
        return (t, h, w)

    def cuts(self, grid: Grid, layer: int, shift: ShiftSpec) -> Cuts:
        cut = balanced if self.form == "contiguous" else strided
        t, h, w = (cut(length, count) for length, count in zip(grid, self.counts(grid), strict=True))
        return (t, h, w)
