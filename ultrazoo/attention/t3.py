"""T3-Video (arXiv 2512.13492): close and remote windows of the same counts, averaged, counts that go round with the layer.

A named composition: it expands to `branched` with contiguous windows (``close``) and residue classes (``remote``), the host's
projections and absolute positions in both, and their mean. With n windows along an axis of L tokens a close window is L/n
neighbours, a remote one every n-th token of the whole axis.

The published code knows one table per model, for one grid each, and refuses others. Here:

1. ``table: wan_1_3b_4k`` and ``wan_5b_4k`` are those tables, for the grids (21, 136, 240) and (21, 68, 120). At another grid
   their counts hold as they are, in windows as even as can be, or are a problem where an axis is too short.
2. ``table: auto`` is our rule for every size, the layout ``about``. Each of the five layers aims at the extents of the first
   table: one frame; (all, 8, 8); (all, 17, 6); (7, 8, 30); (3, 17, 40). An axis is cut by the divisor of its length that
   brings windows nearest to that extent, by ratio (the longer of two as near); where every divisor misses by more than a
   factor of two, as at a prime length, into the nearest number of uneven windows. At (21, 136, 240) that is the first table.
3. Branches that come to the same windows are computed once: the published code attends twice inside single frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import AXES, Grid, per_axis
from ..spec import AttentionSpec, Rope, Site, Start, Traits, option
from .branched import BranchedSpec, BranchSpec
from .full import kernel_problems
from .parts.about import AboutSpec
from .parts.base import AXIS_NAMES, LayoutSpec
from .parts.layouts import StridedSpec, WindowsSpec

Counts = tuple[int, int, int]

CYCLE = 5
TABLES: Mapping[str, tuple[Counts, ...]] = {
    "wan_1_3b_4k": ((21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6)),
    "wan_5b_4k": ((21, 1, 1), (1, 17, 20), (1, 17, 6), (3, 4, 15), (7, 4, 8)),
}
"""Windows along (T, H, W) of layer i mod 5."""

EXTENTS: tuple[Counts, ...] = ((1, 0, 0), (0, 8, 8), (0, 17, 6), (7, 8, 30), (3, 17, 40))
"""Tokens of a window that `auto` aims at, of layer i mod 5; 0 leaves an axis whole."""


@dataclass(frozen=True, kw_only=True)
class T3Spec(AttentionSpec):
    """The mean of attention inside close windows and inside remote ones, in a cycle of five layers."""

    name: ClassVar[str] = "t3"
    source: ClassVar[str] = "T3-Video, arXiv 2512.13492; code at 6bfaf71"
    formula: ClassVar[str] = "y = W_o (softmax attention inside boxes + inside residue classes of the same counts) / 2"

    table: Literal["auto", "wan_1_3b_4k", "wan_5b_4k"] = option(
        "auto", "windows per layer: a published table, or our rule for any size"
    )
    counts: int | tuple[int, ...] | None = option(None, "windows per axis instead of a table's; takes a cycle", ge=1)
    kernel: str = option("auto", "a registered kernel, or auto")

    def fixed(self, layer: int) -> Counts | None:
        """Windows along T, H and W in this layer; None where they depend on the size."""
        if self.counts is not None:
            return per_axis(self.counts)
        return None if self.table == "auto" else TABLES[self.table][layer % CYCLE]

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.counts, tuple) and len(self.counts) not in (2, 3):
            return [Problem("counts", f"got {len(self.counts)} numbers; one or two mean (H, W), three (T, H, W)")]
        found = []
        if self.counts is not None and self.table != "auto":
            found.append(Problem("counts", f"table: {self.table} gives them too", "keep one of the two"))
        path = "table" if self.counts is None else "counts"
        for axis, count, length in zip(AXES, self.fixed(site.layer) or (1, 1, 1), site.grid, strict=True):
            if count > length:
                rule = f"{count} windows do not fit {length} {AXIS_NAMES[axis]}"
                fix = (
                    "table: auto fits every size"
                    if self.counts is None
                    else f"use at most {length} along {axis.upper()}"
                )
                found.append(Problem(path, rule, fix))
        return found + kernel_problems(self.kernel)

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._branched(site.layer)

    def _branched(self, layer: int) -> BranchedSpec:
        counts, extent = self.fixed(layer), EXTENTS[layer % CYCLE]
        close: LayoutSpec = AboutSpec(size=extent) if counts is None else WindowsSpec(counts=counts)
        remote: LayoutSpec = AboutSpec(size=extent, form="strided") if counts is None else StridedSpec(counts=counts)
        branches = {"close": BranchSpec(layout=close), "remote": BranchSpec(layout=remote)}
        return BranchedSpec(branches=branches, kernel=self.kernel)

    def traits(self) -> Traits:
        every = [self._branched(layer).traits() for layer in range(CYCLE)]
        low = [max(traits.min_grid[axis] for traits in every) for axis in range(3)]
        source = "T3-Video, arXiv 2512.13492: 5 K iterations at 720p, then 500 at 4K; untuned output is noise"
        return replace(every[0], start=Start("needs tuning", source), min_grid=(low[0], low[1], low[2]))

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True, layers=5)
        return [
            (cls(counts=(2, 3, 2)), site.at(layer=3)),
            (cls(), site),
            (cls(), site.at(layer=1, grid=Grid(2, 9, 13))),
            (cls(), site.at(layer=4, grid=Grid(1, 4, 45), rope=None, qk_norm=False)),
        ]
