"""Shifts: how odd layers move the window borders, so that neighbours across a border meet in the next layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import Problem
from ...grid import per_axis
from ...ops.partition import AxisRule
from ...ops.runs import AxisCut, rolled
from ...spec import Site, option
from .base import ShiftSpec


@dataclass(frozen=True, kw_only=True)
class NoShiftSpec(ShiftSpec):
    """Every layer has the same windows."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class RollSpec(ShiftSpec):
    """Odd layers move every border to the middle of its window (Swin), without rolling or masking anything: the ends
    become smaller windows. ``amount`` moves by so many tokens instead (windows by size only)."""

    name: ClassVar[str] = "roll"
    source: ClassVar[str] = "Liu et al., arXiv 2103.14030, section 3.2"
    needs: ClassVar[str] = "windows"

    amount: int | tuple[int, ...] | None = option(None, "tokens of the first window per axis; null: half", ge=1)

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.amount, tuple) and len(self.amount) not in (2, 3):
            return [Problem("amount", f"got {len(self.amount)} numbers; one or two mean (H, W), three (T, H, W)")]
        return []

    def _amount(self, axis: int) -> int | None:
        return None if self.amount is None else per_axis(self.amount, whole=0)[axis] or None

    def cut(self, cut: AxisCut, layer: int, axis: int, size: int | None = None) -> AxisCut:
        if not layer % 2:
            return cut
        return rolled(cut, None if size is None else self._amount(axis) or size // 2)

    def rule(self, rule: AxisRule, layer: int, axis: int) -> AxisRule:
        if not layer % 2 or rule.kind == "whole":
            return rule
        if rule.kind == "counts":
            return AxisRule("halves", rule.number)
        return AxisRule("size", rule.number, shift=self._amount(axis) or rule.number // 2)


@dataclass(frozen=True, kw_only=True)
class RepartitionSpec(ShiftSpec):
    """K windows along H and W on even layers, K + 1 on odd ones, so that borders of neighbouring layers cross; along T too
    where time is cut, and time that is whole stays whole."""

    name: ClassVar[str] = "repartition"
    source: ClassVar[str] = "UltraGen, arXiv 2510.18775, section 4.1"
    needs: ClassVar[str] = "counts"

    def count(self, count: int, layer: int) -> int:
        return count + layer % 2
