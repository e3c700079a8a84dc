"""The protocols of the parts of branched attention: layouts, shifts, compressors and fusions.

A part is a spec (options, checks, prices) and, where it owns parameters, a module in the same file. Plugins subclass
these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import Problem
from ...grid import AXES, Grid
from ...ops.partition import AxisRule, Cuts
from ...ops.pool import Ragged, coarse_size
from ...ops.runs import AxisCut
from ...spec import Site, Spec

Lift = Literal["nearest", "bilinear", "bilinear_conv3d"]
AXIS_NAMES = {"t": "frames", "h": "rows", "w": "columns"}


@dataclass(frozen=True, kw_only=True)
class ShiftSpec(Spec):
    """How the windows of odd layers differ from those of even layers."""

    kind: ClassVar[str] = "shift"
    needs: ClassVar[str] = ""
    """``counts`` or ``size`` where only windows given so can be shifted."""

    def count(self, count: int, layer: int) -> int:
        """How many windows an axis of `count` windows gets in `layer`."""
        return count

    def cut(self, cut: AxisCut, layer: int, axis: int, size: int | None = None) -> AxisCut:
        """The windows of one axis in `layer`; `size` where they were given by size."""
        return cut

    def rule(self, rule: AxisRule, layer: int, axis: int) -> AxisRule:
        """The same for an axis whose length is symbolic."""
        return rule


@dataclass(frozen=True, kw_only=True)
class LayoutSpec(Spec):
    """Which tokens attend to each other: windows per axis."""

    kind: ClassVar[str] = "layout"
    given_by: ClassVar[str] = ""
    """``counts`` or ``size`` where the windows are given so; read by shifts. A property in `windows`."""

    ragged: ClassVar[Ragged] = "exact"
    fixed: ClassVar[str] = ""
    """Why sizes cannot be symbolic: a layout that says so has no `rules` and is not exported."""

    def cuts(self, grid: Grid, layer: int, shift: ShiftSpec) -> Cuts:
        """The windows of each axis at `grid` in `layer`."""
        raise TypeError(f"{type(self).__name__} lays nothing out")

    def rules(self, layer: int, shift: ShiftSpec) -> tuple[AxisRule, AxisRule, AxisRule]:
        """The same where sizes are symbolic."""
        raise TypeError(f"{type(self).__name__} has no index form")

    def resized(self, grid: Grid, layer: int, shift: ShiftSpec) -> Grid:
        """The grid that x is resized to before projection; `grid` itself unless ``ragged: resize``."""
        return grid

    def min_grid(self, shift: ShiftSpec) -> tuple[int, int, int]:
        """The smallest grid that every layer can lay out in the index form."""
        return (1, 1, 1)

    def fits(self, grid: Grid, site: Site, shift: ShiftSpec) -> list[Problem]:
        """Problems at `grid`, which is the site's grid after compression; paths relative to the layout."""
        return []


@dataclass(frozen=True, kw_only=True)
class CompressSpec(Spec):
    """Many tokens to one, of queries and keys (``of: both``) or of keys and values only (``of: keys``).

    Subclasses declare ``factor``, ``of``, ``lift`` and ``ragged`` as options.
    """

    kind: ClassVar[str] = "compress"
    default_lift: ClassVar[Lift] = "bilinear"
    reads: ClassVar[Literal["all", "first"]] = "all"
    """Which tokens of a cell matter."""

    factor: Any = 2
    of: Literal["both", "keys"] = "both"
    lift: Lift | None = None
    ragged: Ragged = "exact"

    @property
    def cell(self) -> tuple[int, int, int]:
        """Tokens of a cell along (T, H, W)."""
        from ...grid import per_axis

        return per_axis(self.factor)

    @property
    def lift_mode(self) -> Lift:
        return self.lift or self.default_lift

    def coarse(self, grid: Grid) -> Grid:
        """The grid after compression."""
        return Grid(*(coarse_size(length, f, self.ragged) for length, f in zip(grid, self.cell, strict=True)))

    def problems(self, site: Site) -> list[Problem]:
        found = []
        if self.of == "keys" and self.lift is not None:
            found.append(Problem("lift", "queries are not compressed (of: keys), so nothing is lifted", "leave it out"))
        if self.ragged == "resize":
            for axis, length, factor in zip(AXES, site.grid, self.cell, strict=True):
                if length < factor:
                    rule = f"cells of {factor} do not fit {length} {AXIS_NAMES[axis]}, and ragged: resize drops what is left"
                    found.append(Problem("factor", rule, "use ragged: exact or a smaller factor"))
        return found

    def parameters(self, site: Site) -> int:
        """Parameters of the compressor itself (the lift's are counted apart)."""
        return 0

    def flops(self, site: Site) -> int:
        """FLOPs of compressing the site's grid once."""
        return 0

    def compressor(self, site: Site) -> Any:
        """The module that compresses: ``module(x, traced)``, (B, T, H, W, C) → (B, t, h, w, C)."""
        raise TypeError(f"{type(self).__name__} has no compressor")


@dataclass(frozen=True, kw_only=True)
class FuseSpec(Spec):
    """How the branches' outputs become one."""

    kind: ClassVar[str] = "fuse"
    wants_lse: ClassVar[bool] = False
    needs_timestep: ClassVar[bool] = False
    takes_unlifted: ClassVar[bool] = False
    """Does its module lift the outputs of compressed branches itself, as `Unlifted`?"""

    def branch_problems(self, branches: tuple[str, ...], site: Site) -> list[Problem]:
        """Problems with these branch names at `site`."""
        return []

    def parameters(self, branches: tuple[str, ...], site: Site) -> int:
        return 0

    def flops(self, branches: tuple[str, ...], site: Site) -> int:
        return 0

    def build(self, branches: tuple[str, ...], site: Site) -> Any:
        """The module: ``module(outputs, x, call, lse)`` with outputs name → (B, T, H, W, heads*D), or their `Unlifted` form."""
        raise TypeError(f"{type(self).__name__} has no module")

    def shares(self, branches: tuple[str, ...]) -> Mapping[str, float]:
        """Weight of each branch in a fresh block, where it is known."""
        return {}
