"""Cross-shaped windows: one half of the heads attends in stripes of rows, the other half in stripes of columns.

CSWin (Dong et al., arXiv 2107.00652, sections 3.2 and 3.3): ``y = W_o concat(rows, columns)`` with, in every stripe,
``softmax(Q K^T / sqrt(D)) V + DWConv(V)``: the locally-enhanced positional encoding is a depthwise 3 x 3 convolution of V that
sees zeros beyond the border of the stripe. Published widths are 1, 2, 7 and 7 for the four stages.

Where we depart:

1. Any size: the last stripe is as wide as what is left (the published code wants square inputs of one size that divide).
2. An odd number of heads gives the stripes of rows one more.
3. A video: stripes span all frames, or `frames` at a time; the convolution stays inside a frame.

Published blocks train from scratch; ``start: zero`` starts the convolution at nothing, as a retrofit wants. Without it the block
is `by_head` with windows of size (width, all) and (all, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid
from ..ops.init import Constant, marked
from ..ops.partition import Cuts
from ..ops.stripes import conv_in_stripes
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Site, Start, Traits, option
from .branched import BranchedSpec, BranchSpec
from .contract import Attention, Call, Extra, Host, grid_positions, refuse_segments
from .full import kernel_problems
from .geometry import Geometry, influence
from .grouped import attend_cuts, attend_extra, attend_rules
from .parts.layouts import WindowsSpec
from .parts.shifts import NoShiftSpec

NO_SHIFT = NoShiftSpec()
HALVES = ("rows", "columns")


@dataclass(frozen=True, kw_only=True)
class CrossShapedSpec(AttentionSpec):
    """Stripes of rows for the first half of the heads, of columns for the rest, with a convolution of V inside each."""

    name: ClassVar[str] = "cross_shaped"
    source: ClassVar[str] = "CSWin, Dong et al., arXiv 2107.00652"
    formula: ClassVar[str] = "y = W_o concat over heads of (softmax(Q K^T / sqrt(D)) V + DWConv(V)) inside each stripe"

    width: int = option(7, "rows or columns of a stripe", ge=1)
    frames: int = option(0, "frames of a stripe; 0: all", ge=0)
    lepe: bool = option(True, "add a depthwise 3 x 3 convolution of V, zeros beyond the stripe")
    start: Literal["random", "zero"] = option("random", "the convolution starts as torch starts one, or at zero")
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def layouts(self) -> tuple[WindowsSpec, WindowsSpec]:
        """Stripes of rows and stripes of columns."""
        return WindowsSpec(size=(self.frames, self.width, 0)), WindowsSpec(size=(self.frames, 0, self.width))

    def stripes(self, grid: Grid) -> tuple[Cuts, Cuts]:
        rows, columns = (layout.cuts(grid, 0, NO_SHIFT) for layout in self.layouts)
        return rows, columns

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        if site.heads < 2:
            rule = f"stripes of rows and of columns need a head each, got {site.heads}"
            found.append(Problem("", rule, "use branched with windows of size [width, 0] for one head"))
        if self.start == "zero" and not self.lepe:
            found.append(Problem("start", "there is no convolution to start at zero (lepe: false)", "leave start out"))
        return found

    def cost(self, site: Site) -> Cost:
        counts, extra, tokens = split_heads(site.heads), site.extra_tokens, site.tokens
        rows = []
        for name, heads, cuts in zip(HALVES, counts, self.stripes(site.grid), strict=True):
            pairs = _place(site.grid, cuts).pairs + extra * (tokens + tokens + extra)
            conv = heads * site.head_dim if self.lepe else 0
            # nine taps per channel and a bias
            rows.append(BranchCost(name, pairs, 4 * pairs * heads * site.head_dim, 0, 18 * tokens * conv, 10 * conv))
        total = sum(heads * row.pairs for heads, row in zip(counts, rows, strict=True))
        lepe = 3 * tokens * site.inner if self.lepe else 0
        return Cost(
            pairs=round(total / site.heads),
            attention_flops=sum(row.attention_flops for row in rows),
            qkv_flops=2 * tokens * site.dim * 3 * site.width,
            out_flops=2 * tokens * site.inner * site.dim,
            other_flops=sum(row.other_flops for row in rows),
            parameters=sum(row.parameters for row in rows),
            peak_elements=6 * tokens * site.width + lepe,
            saved_elements=(6 + 2 * site.qk_norm) * tokens * site.width + tokens * site.heads + lepe,
            branches=tuple(rows),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        rows, columns = (influence(_place(site.grid, cuts), None, queries) for cuts in self.stripes(site.grid))
        first, second = split_heads(site.heads)
        return np.stack([rows] * first + [columns] * second)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray | None:
        branches = {name: BranchSpec(layout=layout) for name, layout in zip(HALVES, self.layouts, strict=True)}
        return BranchedSpec(branches=branches).reach(site, tokens)

    def traits(self) -> Traits:
        low = [max(layout.min_grid(NO_SHIFT)[axis] for layout in self.layouts) for axis in range(3)]
        return Traits(
            start=Start("needs tuning", "changes what tokens see; published blocks are trained from scratch"),
            min_grid=(low[0], low[1], low[2]),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True)
        return [
            (cls(width=2), site),
            (cls(width=2), site.at(grid=Grid(1, 4, 5), rope=None, qk_norm=False, heads=4)),
            (cls(width=1, frames=2, lepe=False), site.at(grid=Grid(3, 3, 5), heads=2)),
        ]


def split_heads(heads: int) -> tuple[int, int]:
    """Heads with stripes of rows, and with stripes of columns."""
    first = (heads + 1) // 2
    return first, heads - first


def _extra_of(extra: Extra, heads: slice) -> Extra:
    return replace(extra, q=extra.q[:, :, heads], k=extra.k[:, :, heads], v=extra.v[:, :, heads])


def _place(grid: Grid, cuts: Cuts) -> Geometry:
    return Geometry(grid, grid, grid, grid, grid, cuts, cuts)


class CrossShapedAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens, which every stripe sees, also (B, M, heads*D)."""

    def __init__(self, spec: CrossShapedSpec, site: Site):
        super().__init__(spec, site)
        self.lepe: nn.Module | None = None
        if spec.lepe:
            self.lepe = nn.Conv2d(site.inner, site.inner, 3, padding=1, groups=site.inner)
            if spec.start == "zero":
                marked(self.lepe, weight=Constant(0.0), bias=Constant(0.0))

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        valid = None if call.key_valid is None else call.key_valid.unflatten(1, call.grid)
        first = split_heads(self.site.heads)[0]
        halves = []
        for half, heads in enumerate((slice(0, first), slice(first, None))):
            zq, zk, zv = (z[:, :, heads].unflatten(1, call.grid) for z in (q, k, v))
            y = self._attend(half, zq, zk, zv, call, valid, heads)  # (B, T, H, W, heads, D)
            if self.lepe is not None:
                y = y + self._lepe(half, zv, valid, heads)
            halves.append(y)
        out = host.out(torch.cat(halves, dim=4).flatten(1, 3).flatten(2))
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, k, v, call.key_valid, spec.kernel)

    def _attend(
        self, half: int, q: Tensor, k: Tensor, v: Tensor, call: Call, valid: Tensor | None, heads: slice
    ) -> Tensor:
        spec: Any = self.spec
        extra = None if call.extra is None else _extra_of(call.extra, heads)
        common: Any = {"extra": extra, "key_valid": valid, "kernel": spec.kernel}
        if self.traced:
            rules = spec.layouts[half].rules(0, NO_SHIFT)
            return attend_rules(q, k, v, rules, rules, **common)[0]
        cuts = spec.stripes(Grid(*call.grid))[half]
        return attend_cuts(q, k, v, cuts, cuts, **common)[0]

    def _lepe(self, half: int, v: Tensor, valid: Tensor | None, heads: slice) -> Tensor:
        """(B, T, H, W, heads, D) convolved inside stripes: what stands in an invalid token counts as zero."""
        spec: Any = self.spec
        lepe: Any = self.lepe
        size = self.site.head_dim
        channels = slice(heads.start * size, None if heads.stop is None else heads.stop * size)
        if valid is not None:
            v = v.masked_fill(~valid[..., None, None], 0.0)
        image = v.flatten(4).flatten(0, 1).movedim(-1, 1)  # (B*T, heads*D, H, W)
        weight, bias = lepe.weight[channels], lepe.bias[channels]
        if half == 1:
            # stripes of columns are stripes of rows of the transposed image
            image, weight = image.transpose(2, 3), weight.transpose(2, 3)
        y = conv_in_stripes(image, weight, bias, spec.width)
        y = y if half == 0 else y.transpose(2, 3)
        return y.movedim(1, -1).unflatten(0, v.shape[:2]).unflatten(-1, (-1, size))


CrossShapedSpec.module = CrossShapedAttention
