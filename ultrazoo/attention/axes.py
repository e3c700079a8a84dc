"""Attention along axes: a token sees those that differ from it along some axes only.

Axial attention (Ho et al., arXiv 1912.12180, section 3) takes one axis per layer, in turn: the default. Latte (arXiv
2401.03048, variant 1) alternates whole frames and time, frames on even layers: ``axes: [hw, t]``. ``mode: sum`` and ``mean``
run all groups of axes in one layer and add or average their outputs; the mean is ours, so that a retrofit keeps the size of
the output.

A named composition: it expands to `branched` with one branch per group, windows of one token on the other axes. Where we
depart: the projections are the host's own in every group (the published blocks are trained with their own per axis; Latte's
temporal blocks have no cross-attention, which is the backbone's matter). On an image a group ``t`` has one token to see,
itself: those layers give W_o v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import AXES, Grid
from ..spec import AttentionSpec, Rope, Site, Start, Traits, option
from .branched import BranchedSpec, BranchSpec
from .full import kernel_problems
from .parts.fuse import WeightsSpec
from .parts.layouts import WindowsSpec


@dataclass(frozen=True, kw_only=True)
class AxesSpec(AttentionSpec):
    """Attention along groups of axes, one group per layer in turn or all of them side by side."""

    name: ClassVar[str] = "axes"
    source: ClassVar[str] = "Ho et al., arXiv 1912.12180; Latte, arXiv 2401.03048"
    formula: ClassVar[str] = (
        "y = W_o softmax(Q K^T / sqrt(D)) V along one group of axes per layer, or the sum of all groups"
    )

    axes: tuple[str, ...] = option(("t", "h", "w"), "groups of axes in turn: t, h, w or several together, as hw")
    mode: Literal["alternate", "sum", "mean"] = option(
        "alternate", "layer i takes group i mod their number, or every layer all of them"
    )
    kernel: str = option("auto", "a registered kernel, or auto")

    def problems(self, site: Site) -> list[Problem]:
        if not self.axes:
            return [Problem("axes", "there are none", "give groups of t, h and w, such as [t, h, w] or [hw, t]")]
        found = []
        for index, group in enumerate(self.axes):
            strange = sorted(set(group) - set(AXES))
            if not group or strange or len(set(group)) < len(group):
                why = "is empty" if not group else f"has no axis {strange[0]!r}" if strange else "names an axis twice"
                found.append(Problem(f"axes.{index}", f"{group!r} {why}", "a group is some of the letters t, h and w"))
        if self.mode != "alternate" and not found:
            sorted_groups = ["".join(sorted(group)) for group in self.axes]
            for index, group in enumerate(self.axes):
                if sorted_groups.index("".join(sorted(group))) < index:
                    rule = f"group {group!r} is there already, and mode: {self.mode} runs every group in every layer"
                    found.append(Problem(f"axes.{index}", rule, "leave it out"))
        return found + kernel_problems(self.kernel)

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._branched(site.layer)

    def _branched(self, layer: int) -> BranchedSpec:
        groups = self.axes if self.mode != "alternate" else (self.axes[layer % len(self.axes)],)
        # windows of one token on the axes that are not attended along; 0 leaves an axis whole
        branches = {
            f"along_{group}": BranchSpec(layout=WindowsSpec(size=tuple(0 if axis in group else 1 for axis in AXES)))
            for group in groups
        }
        weights = dict.fromkeys(branches, 1.0) if self.mode == "sum" else None
        return BranchedSpec(branches=branches, fuse=WeightsSpec(weights=weights), kernel=self.kernel)

    def traits(self) -> Traits:
        every = [self._branched(layer).traits() for layer in range(len(self.axes))]
        low = [max(traits.min_grid[axis] for traits in every) for axis in range(3)]
        # the same in every layer, once each
        whole = all(set(group) == set(AXES) for group in self.axes) and (self.mode != "sum" or len(self.axes) == 1)
        return Traits(
            start=Start("exact", "computes full attention")
            if whole
            else Start("needs tuning", "changes what tokens see; published blocks are trained from scratch"),
            exact_at_init=whole,
            min_grid=(low[0], low[1], low[2]),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True, layer=1, layers=3)
        return [
            (cls(), site),
            (cls(axes=("hw", "t")), site),
            (cls(mode="sum"), site.at(grid=Grid(1, 4, 5), rope=None, qk_norm=False)),
            (cls(axes=("tw", "h"), mode="mean"), site.at(grid=Grid(2, 3, 5))),
        ]
