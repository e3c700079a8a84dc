"""Neighbourhood attention: every query sees a box of keys around itself, of the same size everywhere.

Generalised Neighborhood Attention (GNA, arXiv 2504.16922; NATTEN, 2204.07143), per axis with kernel k, stride s and dilation d:
queries of one residue class modulo d come in groups of s that share the window of their leader, the token at ``s // 2`` of the
group; ``centre = clamp(leader, k // 2, n - 1 - right)`` with ``right = k // 2 + k % 2 - 1`` and n the tokens of the class. An even
kernel reaches one token farther back. s = 1 slides, s = k is blocked, sizes between stride. Causal along time: keys up to the query,
at most k back from the last frame of the group. Extra keys are seen by all, in the same softmax.

Where we depart:

1. k = 1 works on any axis (NATTEN wants at least 2), so images and single frames are settings, not another function.
2. ``full`` is a kernel too: the whole axis, at every size; ``short: whole`` makes it so where an axis is too short.
3. Nothing is padded to tiles: tiles are chosen for the grid (`ops.boxes`), borders get their own.

Windows of w tokens without overlap are (w, s = w), a sliding window of m tiles of n tokens (STA, m odd) is (m * n, s = n),
MaxViT's grid of w points is (w, d = length / w), axial attention is ``full`` on one axis and 1 on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import Problem
from ..grid import AXES, Grid
from ..ops.boxes import AxisView, neighborhood
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .full import kernel_problems
from .views import NO_EXPORT, Group, ViewsAttention, ViewsSpec, one_to

Size = int | Literal["full"]


@dataclass(frozen=True, kw_only=True)
class NeighborhoodSpec(ViewsSpec):
    """A box of keys per query. One value or two are for (H, W), and time stays whole; three are for (T, H, W)."""

    name: ClassVar[str] = "neighborhood"
    source: ClassVar[str] = "GNA, arXiv 2504.16922; NATTEN, arXiv 2204.07143; code SHI-Labs/NATTEN 8c8729f"
    formula: ClassVar[str] = "y_i = W_o softmax over j in box(i) of (q_i k_j / sqrt(D)) v_j, |box(i)| = k_t k_h k_w"
    minimal: ClassVar[Mapping[str, Any]] = {"kernel_size": 7}

    kernel_size: Size | tuple[Size, ...] = option(doc="keys per query along each axis; full: the whole axis", ge=1)
    stride: int | tuple[int, ...] = option(1, "neighbouring queries that share a window; at most the kernel", ge=1)
    dilation: int | tuple[int, ...] = option(1, "distance between neighbouring keys", ge=1)
    causal: bool = option(False, "along time: no key after the query")
    short: Literal["refuse", "whole"] = option(
        "refuse", "an axis with fewer tokens than the kernel spans: a problem, or seen whole"
    )
    scale: float | None = option(None, "what scores are multiplied by; null: D**-0.5", gt=0)
    kernel: str = option("auto", "a registered kernel, or auto")

    def axes(self, grid: Grid) -> list[tuple[Size, int, int]]:
        """Kernel, stride and dilation of (T, H, W) at a grid."""
        kernels, strides, dilations = spread(self.kernel_size, "full"), spread(self.stride, 1), spread(self.dilation, 1)
        found: list[tuple[Size, int, int]] = []
        for length, kernel, stride, dilation in zip(grid, kernels, strides, dilations, strict=True):
            short = self.short == "whole" and kernel != "full" and kernel * dilation > length
            found.append(("full", 1, 1) if short else (kernel, stride, dilation))
        return found

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        for path in ("kernel_size", "stride", "dilation"):
            value = getattr(self, path)
            if isinstance(value, tuple) and len(value) not in (2, 3):
                found.append(
                    Problem(path, f"got {len(value)} values", "give one, two for (H, W) or three for (T, H, W)")
                )
        if found:
            return found
        for axis, length, (kernel, stride, dilation) in zip(AXES, site.grid, self.axes(site.grid), strict=True):
            found += axis_problems(axis, length, kernel, stride, dilation)
        return found or self.mask_problems(self.kernel, site)

    def groups(self, grid: Grid, heads: int) -> tuple[Group, ...]:
        t, h, w = (
            axis_view(length, *options, self.causal and axis == "t")
            for axis, length, options in zip(AXES, grid, self.axes(grid), strict=True)
        )
        return (Group("window", None, (t, h, w)),)

    def score_scale(self, head_dim: int) -> float | None:
        return self.scale

    def traits(self) -> Traits:
        full = all(kernel == "full" for kernel in spread(self.kernel_size, "full"))
        exact = full and not self.causal and self.scale is None
        start = (
            Start("exact", "computes full attention")
            if exact
            else Start("training-free", "arXiv 2504.16922: at moderate sparsity on HunyuanVideo, Cosmos and FLUX")
        )
        return Traits(start=start, exact_at_init=exact, export=(), notes=NO_EXPORT)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(kernel_size=(2, 3, 4)), site.at(extra=(Segment("text", 4),))),
            (
                cls(kernel_size=(3, 4, 3), stride=(2, 3, 2), dilation=(1, 1, 2), causal=True),
                site.at(grid=Grid(5, 5, 7)),
            ),
            (cls(kernel_size=(1, "full", 3), scale=0.5), site.at(grid=Grid(2, 4, 5), rope=None)),
            (
                cls(kernel_size=(3, 3, 5), dilation=(2, 1, 1), short="whole"),
                site.at(grid=Grid(1, 4, 5), has_timestep=False),
            ),
        ]


def spread(value: Any, time: Any) -> tuple[Any, Any, Any]:
    """An option over (T, H, W): one value or two are for (H, W), `time` is then that of T."""
    if not isinstance(value, tuple):
        return (time, value, value)
    return (time, *value) if len(value) == 2 else (value[0], value[1], value[2])


def axis_view(length: int, kernel: Size, stride: int, dilation: int, causal: bool) -> AxisView:
    return neighborhood(length, length if kernel == "full" else kernel, stride, dilation, causal)


def axis_problems(axis: str, length: int, kernel: Size, stride: int, dilation: int) -> list[Problem]:
    """Everything wrong along one axis, with what is legal there."""
    if kernel == "full":
        found = []
        if stride > 1:
            found.append(Problem("stride", f"{stride} along {axis}: all queries of a full axis see the same", "use 1"))
        if dilation > 1:
            found.append(Problem("dilation", f"{dilation} along {axis}: a full axis leaves no key out", "use 1"))
        return found
    if kernel > length:
        rule = f"{kernel} along {axis} is more than the {length} tokens there"
        return [Problem("kernel_size", rule, f"use {one_to(length)}, full, or short: whole")]
    found = []
    if stride > kernel:
        rule = f"{stride} along {axis} is more than the kernel of {kernel}: queries would not see themselves"
        found.append(Problem("stride", rule, f"use {one_to(kernel)}"))
    if kernel * dilation > length:
        rule = f"{dilation} along {axis} spreads {kernel} keys over {kernel * dilation} places, there are {length}"
        fewer = f", or a kernel of {one_to(length // dilation)}" if dilation <= length else ""
        found.append(Problem("dilation", rule, f"use {one_to(length // kernel)}{fewer}"))
    return found


NeighborhoodSpec.module = ViewsAttention
