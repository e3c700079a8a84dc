"""Layouts: which tokens of the grid attend to each other.

Axes: one number or two mean (H, W) with T whole, three mean (T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import Problem
from ...grid import AXES, Grid, per_axis
from ...ops.partition import AxisRule, Cuts
from ...ops.pool import nearest_multiple
from ...ops.runs import AxisCut, balanced, exact, strided, whole
from ...spec import Site, option
from .base import AXIS_NAMES, LayoutSpec, ShiftSpec

_WHOLE = AxisRule("whole")


@dataclass(frozen=True, kw_only=True)
class WholeSpec(LayoutSpec):
    """One window: the whole grid."""

    name: ClassVar[str] = "whole"

    def cuts(self, grid: Grid, layer: int, shift: ShiftSpec) -> Cuts:
        return (whole(grid.t), whole(grid.h), whole(grid.w))

    def rules(self, layer: int, shift: ShiftSpec) -> tuple[AxisRule, AxisRule, AxisRule]:
        return (_WHOLE, _WHOLE, _WHOLE)


def _counts_problems(counts: tuple[int, ...], grid: Grid, path: str) -> list[Problem]:
    found = []
    for axis, count, length in zip(AXES, counts, grid, strict=True):
        if count > length:
            rule = f"{count} windows do not fit {length} {AXIS_NAMES[axis]}"
            found.append(Problem(path, rule, f"use at most {length} along {axis.upper()}, or a larger video"))
    return found


@dataclass(frozen=True, kw_only=True)
class WindowsSpec(LayoutSpec):
    """Contiguous windows: so many per axis, as equal as can be and longer ones first (``counts``), or of so many tokens
    with a shorter last one (``size``)."""

    name: ClassVar[str] = "windows"
    source: ClassVar[str] = "Liu et al., arXiv 2103.14030; UltraGen, arXiv 2510.18775"
    minimal: ClassVar[Mapping[str, Any]] = {"counts": [4, 4]}

    counts: int | tuple[int, ...] | None = option(None, "windows per axis", ge=1)
    size: int | tuple[int, ...] | None = option(None, "tokens per window and axis; 0 leaves an axis whole", ge=0)
    ragged: Literal["exact", "resize"] = option(
        "exact", "windows of unequal length, or x resized to the nearest multiple (the released UltraGen)"
    )

    @property
    def given_by(self) -> str:  # type: ignore[override]
        return "counts" if self.counts is not None else "size"

    def problems(self, site: Site) -> list[Problem]:
        if (self.counts is None) == (self.size is None):
            got = "neither is given" if self.counts is None else "both are given"
            return [Problem("", f"windows need either counts or size, {got}", "keep one of them")]
        found = []
        path = self.given_by
        value = self.counts if self.counts is not None else self.size
        if isinstance(value, tuple) and len(value) not in (2, 3):
            found.append(Problem(path, f"got {len(value)} numbers; one or two mean (H, W), three (T, H, W)"))
        if self.ragged == "resize" and self.counts is None:
            found.append(Problem("ragged", "resize needs windows by counts", "give counts, or use ragged: exact"))
        if self.ragged == "resize" and self.counts is not None and not found and per_axis(self.counts)[0] > 1:
            found.append(Problem("ragged", "resize acts on each frame and cannot cut time", "leave T whole"))
        return found

    def fits(self, grid: Grid, site: Site, shift: ShiftSpec) -> list[Problem]:
        if self.counts is None:
            return []
        return _counts_problems(self._counts(site.layer, shift), grid, "counts")

    def _counts(self, layer: int, shift: ShiftSpec) -> tuple[int, int, int]:
        assert self.counts is not None
        t, h, w = per_axis(self.counts)
        return (shift.count(t, layer) if t > 1 else t, shift.count(h, layer), shift.count(w, layer))

    def cuts(self, grid: Grid, layer: int, shift: ShiftSpec) -> Cuts:
        cuts: list[AxisCut] = []
        if self.counts is not None:
            for axis, (length, count) in enumerate(zip(grid, self._counts(layer, shift), strict=True)):
                cuts.append(shift.cut(balanced(length, count), layer, axis))
        else:
            assert self.size is not None
            for axis, (length, size) in enumerate(zip(grid, per_axis(self.size, whole=0), strict=True)):
                fits = 0 < size < length
                cuts.append(shift.cut(exact(length, size), layer, axis, size) if fits else whole(length))
        return (cuts[0], cuts[1], cuts[2])

    def rules(self, layer: int, shift: ShiftSpec) -> tuple[AxisRule, AxisRule, AxisRule]:
        if self.counts is not None:
            plain = [AxisRule("counts", count) if count > 1 else _WHOLE for count in self._counts(layer, shift)]
        else:
            assert self.size is not None
            plain = [AxisRule("size", size) if size else _WHOLE for size in per_axis(self.size, whole=0)]
        t, h, w = (shift.rule(rule, layer, axis) for axis, rule in enumerate(plain))
        return (t, h, w)

    def resized(self, grid: Grid, layer: int, shift: ShiftSpec) -> Grid:
        if self.ragged == "exact":
            return grid
        counts = self._counts(layer, shift)
        return Grid(grid.t, nearest_multiple(grid.h, counts[1]), nearest_multiple(grid.w, counts[2]))

    def min_grid(self, shift: ShiftSpec) -> tuple[int, int, int]:
        rules = [rule for layer in (0, 1) for rule in (self.rules(layer, shift),)]
        t, h, w = (max(_smallest(rule[axis]) for rule in rules) for axis in range(3))
        return (t, h, w)


def _smallest(rule: AxisRule) -> int:
    if rule.kind == "whole":
        return 1
    return {"counts": rule.number + 1, "strided": rule.number + 1, "size": rule.number + 1}.get(
        rule.kind, 2 * rule.number
    )


@dataclass(frozen=True, kw_only=True)
class StridedSpec(LayoutSpec):
    """Interleaved windows: tokens n apart along an axis attend to each other (MaxViT's grid, T3's remote windows)."""

    name: ClassVar[str] = "strided"
    source: ClassVar[str] = "Tu et al., arXiv 2204.01697; T3-Video, arXiv 2512.13492"
    minimal: ClassVar[Mapping[str, Any]] = {"counts": [4, 4]}

    counts: int | tuple[int, ...] = option(doc="windows per axis: tokens n apart share one", ge=1)

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.counts, tuple) and len(self.counts) not in (2, 3):
            return [Problem("counts", f"got {len(self.counts)} numbers; one or two mean (H, W), three (T, H, W)")]
        return []

    def fits(self, grid: Grid, site: Site, shift: ShiftSpec) -> list[Problem]:
        return _counts_problems(per_axis(self.counts), grid, "counts")

    def cuts(self, grid: Grid, layer: int, shift: ShiftSpec) -> Cuts:
        t, h, w = (strided(length, count) for length, count in zip(grid, per_axis(self.counts), strict=True))
        return (t, h, w)

    def rules(self, layer: int, shift: ShiftSpec) -> tuple[AxisRule, AxisRule, AxisRule]:
        t, h, w = (AxisRule("strided", count) if count > 1 else _WHOLE for count in per_axis(self.counts))
        return (t, h, w)

    def min_grid(self, shift: ShiftSpec) -> tuple[int, int, int]:
        t, h, w = (count + 1 if count > 1 else 1 for count in per_axis(self.counts))
        return (t, h, w)
