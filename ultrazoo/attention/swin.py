"""Shifted windows: attention inside windows of a fixed size whose borders move by half a window on odd layers.

Swin (Liu et al., arXiv 2103.14030, equations 3 and 4) for images, Video Swin (arXiv 2106.13230) for videos, whose window of
8 x 7 x 7 is the default: ``y = W_o softmax(Q K^T / sqrt(D) + B) V`` in each window, B from a table by relative position.

Where we depart:

1. Sizes that windows do not divide are not padded. The published code pads each axis with zeros after the norm and lets them
   be keys; here the last window is short, and the shifted layer is the runs s, w, …, w, rest: at sizes that divide, the very
   windows that rolling by s and masking leave.
2. An axis no longer than the window is one window and is not shifted, as published; the bias of a short window is the table's
   at its own offsets (the published index goes wrong where rows or columns are clipped).
3. On a host with rotary embedding the table is left out and the host's absolute positions stay (``bias: auto``).
4. Windows given as (H, W) span all frames; their table knows no offset in time: the 2-D table, the same for every pair of
   frames, which is how Video Swin inflates it.

Published blocks train from scratch with a truncated normal of 0.02 (cut at a hundred standard deviations, so a plain normal
here); ``start: zero`` keeps the scores of pretrained weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid, per_axis
from ..ops.init import Constant, Normal
from ..spec import AttentionSpec, Cost, Rope, Site, Start, Traits, option
from .branched import BranchedSpec, BranchSpec
from .contract import Attention, Call, Host, grid_positions, refuse_segments
from .full import kernel_problems
from .grouped import attend_cuts, attend_extra, attend_rules
from .parts.layouts import WindowsSpec
from .parts.shifts import RollSpec


@dataclass(frozen=True, kw_only=True)
class SwinSpec(AttentionSpec):
    """Windows of a fixed size, shifted by half on odd layers, with a table of biases by relative position."""

    name: ClassVar[str] = "swin"
    source: ClassVar[str] = "Liu et al., arXiv 2103.14030; Video Swin, arXiv 2106.13230"
    formula: ClassVar[str] = "y = W_o softmax(Q K^T / sqrt(D) + B) V inside each window, B by relative position"

    window: int | tuple[int, ...] = option((8, 7, 7), "tokens of a window: (H, W) or (T, H, W)", ge=1)
    bias: bool | Literal["auto"] = option("auto", "relative position bias; auto: only on a host that rotates nothing")
    start: Literal["normal", "zero"] = option("normal", "the table starts normal (0.02), or zero as a retrofit wants")
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def extents(self) -> tuple[int, int, int]:
        """Tokens of a window per axis; 0 where it spans all frames."""
        return per_axis(self.window, whole=0)

    def biased(self, site: Site) -> bool:
        return site.rope is None if self.bias == "auto" else self.bias

    def rows(self) -> int:
        """Rows of the table: relative offsets inside a window."""
        t, h, w = (2 * max(size, 1) - 1 for size in self.extents)
        return t * h * w

    def windows(self) -> BranchedSpec:
        """The same windows without a table."""
        return BranchedSpec(
            branches={"windows": BranchSpec(layout=WindowsSpec(size=self.window), shift=RollSpec())}, kernel=self.kernel
        )

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.window, tuple) and len(self.window) not in (2, 3):
            rule = f"got {len(self.window)} numbers; one or two mean (H, W), three (T, H, W)"
            return [Problem("window", rule)]
        found = kernel_problems(self.kernel, ("bias",) if self.biased(site) else ())
        if self.start == "zero" and not self.biased(site):
            why = "bias: false" if self.bias is False else "this host has rotary embedding, so bias: auto leaves it out"
            found.append(
                Problem("start", f"there is no table to start at zero ({why})", "leave start out, or bias: true")
            )
        return found

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) or self.biased(site) else self.windows()

    def cost(self, site: Site) -> Cost:
        found = self.windows().cost(site)
        if not self.biased(site):
            return found
        cuts = _cuts(self, site.grid, site.layer)
        longest = cuts[0].longest * cuts[1].longest * cuts[2].longest
        table = self.rows() * site.heads
        return replace(
            found,
            parameters=table,
            branches=tuple(replace(row, parameters=table) for row in found.branches),
            peak_elements=found.peak_elements + site.heads * longest * longest,
            # the gradient of a bias needs the probabilities
            saved_elements=found.saved_elements + site.heads * found.branches[0].pairs,
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        return self.windows().visible(site, queries)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray | None:
        return self.windows().reach(site, tokens)

    def traits(self) -> Traits:
        return replace(
            self.windows().traits(),
            start=Start(
                "needs tuning", "STA, arXiv 2502.04507: HunyuanVideo loses 3.7 VBench points with shifted windows"
            ),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), qk_norm=True, layer=1, layers=2)
        rope = Rope(axes=(4, 2, 2))
        return [
            (cls(window=(2, 3, 4)), site),
            (cls(window=(3, 2)), site.at(grid=Grid(1, 4, 5), layer=0, qk_norm=False)),
            (cls(window=(2, 3, 4), bias=True, start="zero"), site.at(rope=rope)),
            (cls(window=(2, 3, 3)), site.at(rope=rope)),
        ]


def _cuts(spec: SwinSpec, grid: Grid, layer: int) -> Any:
    return WindowsSpec(size=spec.window).cuts(grid, layer, RollSpec())


class SwinAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens, whose keys get no bias, also (B, M, heads*D)."""

    def __init__(self, spec: SwinSpec, site: Site):
        super().__init__(spec, site)
        self.bias_table = nn.Parameter(torch.empty(spec.rows(), site.heads))

    def initial_values(self) -> dict[str, Any]:
        spec: Any = self.spec
        return {"bias_table": Constant(0.0) if spec.start == "zero" else Normal(0.02)}

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        valid = None if call.key_valid is None else call.key_valid.unflatten(1, call.grid)
        common: Any = {"extra": call.extra, "key_valid": valid, "kernel": spec.kernel}
        biases = Biases(self)
        zq, zk, zv = (z.unflatten(1, call.grid) for z in (q, k, v))
        if self.traced:
            rules = WindowsSpec(size=spec.window).rules(self.site.layer, RollSpec())
            y, _ = attend_rules(zq, zk, zv, rules, rules, bias=biases.made, **common)
        else:
            cuts = _cuts(spec, Grid(*call.grid), self.site.layer)
            y, _ = attend_cuts(zq, zk, zv, cuts, cuts, bias=biases.once, **common)
        out = host.out(y.flatten(1, 3).flatten(2))
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, k, v, call.key_valid, spec.kernel)


class Biases:
    """The table as biases of windows of t·h·w = n tokens, no larger than the table's: (1, heads, n, n)."""

    def __init__(self, block: SwinAttention):
        spec: Any = block.spec
        self.table, self.extents = block.bias_table, spec.extents
        self._kept: dict[tuple[int, int, int], Tensor] = {}

    def once(self, sizes: tuple[int, int, int]) -> Tensor:
        """The same tensor for the same sizes, within one call."""
        if sizes not in self._kept:
            self._kept[sizes] = self.made(sizes)
        return self._kept[sizes]

    def made(self, sizes: tuple[int, int, int]) -> Tensor:
        row: Any = 0
        for axis, (size, extent) in enumerate(zip(sizes, self.extents, strict=True)):
            row = row * (2 * max(extent, 1) - 1) + self._offsets(size, extent, axis)
        # rows of the table, (t, h, w, t, h, w) → (n, n)
        found = self.table[row.flatten(3).flatten(0, 2)]
        return found.permute(2, 0, 1).unsqueeze(0)

    def _offsets(self, size: int, extent: int, axis: int) -> Tensor:
        """Where the offset of each pair of places on one axis stands in the table, as a six-dimensional block."""
        at = torch.arange(size, device=self.table.device)
        offset = at[:, None] - at + (extent - 1) if extent else torch.zeros_like(at[:, None] - at)
        shape = [1] * 6
        shape[axis] = shape[axis + 3] = size
        return offset.reshape(shape)


SwinSpec.module = SwinAttention
