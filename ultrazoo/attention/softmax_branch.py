"""A softmax attention beside another one, with projections of its own, added through one learned number.

``y = other(x) + scale * W_s softmax(q_s k_s^T / sqrt(D)) v_s`` over all tokens or inside windows: SANA-Video's optional
branch (code NVlabs/Sana, `sana_multi_scale_video`), whose scale starts at 100. Its projections have biases and start as
torch starts them; norms over all heads and the rotary embedding stand where the host has them.

We depart from the released code in three places: windows at sizes that do not divide are uneven and not padded; tokens that
are not real are no keys; extra tokens, which come projected for the other attention, are not seen by the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import Problem
from ..ops.init import Constant, marked
from ..ops.norm import rms_norm
from ..ops.partition import AxisRule
from ..ops.runs import AxisCut, balanced
from ..spec import BranchCost, Options, Site, option
from .contract import Call, Host, grid_positions
from .full import kernel_problems
from .grouped import attend_cuts, attend_rules

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SoftmaxBranchSpec(Options):
    """Softmax attention over everything, or inside windows."""

    windows: tuple[int, ...] | None = option(None, "balanced windows along (T, H, W); null: every token sees all", ge=1)
    scale: float = option(100.0, "what the learned factor of the branch starts at")
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def counts(self) -> tuple[int, int, int]:
        t, h, w = self.windows or (1, 1, 1)
        return t, h, w

    def cuts(self, grid: Sequence[int]) -> tuple[AxisCut, AxisCut, AxisCut]:
        t, h, w = (balanced(length, count) for length, count in zip(grid, self.counts, strict=True))
        return t, h, w

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        if site.host_heads is not None:
            rule = "the branch adds an output projection to the stream, which a group of heads does not have"
            found.append(Problem("", rule, "give it all heads of the layer"))
        if self.windows is None:
            return found
        if len(self.windows) != 3:
            return [*found, Problem("windows", f"got {len(self.windows)} numbers", "give three: (T, H, W)")]
        for axis, count, length in zip("THW", self.windows, site.grid, strict=True):
            if count > length:
                found.append(Problem("windows", f"{count} windows along {axis} = {length}", f"at most {length}"))
        return found

    def cost(self, site: Site) -> BranchCost:
        pairs = 1
        for cut in self.cuts(site.grid):
            pairs *= sum(size * size for size in cut.sizes())
        tokens, dim, inner = site.tokens, site.dim, site.inner
        own = 3 * inner * (dim + 1) + dim * (inner + 1) + 1 + 2 * inner * site.qk_norm
        return BranchCost(
            "softmax", pairs, 4 * pairs * inner, 2 * tokens * dim * 3 * inner, 2 * tokens * inner * dim, own
        )

    @property
    def min_grid(self) -> tuple[int, int, int]:
        t, h, w = (1 if count == 1 else count + 1 for count in self.counts)
        return t, h, w


class SoftmaxBranch(nn.Module):
    """(B, N, C) → (B, N, C), scaled."""

    def __init__(self, spec: SoftmaxBranchSpec, site: Site):
        super().__init__()
        self.spec, self.site = spec, site
        self.q, self.k, self.v = (nn.Linear(site.dim, site.inner) for _ in range(3))
        self.proj = nn.Linear(site.inner, site.dim)
        self.scale = nn.Parameter(torch.empty(1))
        names = ("norm_q", "norm_k") if site.qk_norm else ()
        for name in ("norm_q", "norm_k"):
            self.register_parameter(name, nn.Parameter(torch.empty(site.inner)) if names else None)
        marked(self, scale=Constant(spec.scale), **dict.fromkeys(names, Constant(1.0)))

    def forward(self, x: Tensor, host: Host, call: Call, traced: bool) -> Tensor:
        grid, valid = call.grid, call.key_valid
        place = grid_positions(grid, x.device)
        q, k = (
            host.rotate(self._heads(z, norm), place) for z, norm in ((self.q(x), self.norm_q), (self.k(x), self.norm_k))
        )
        v = self._heads(self.v(x), None)  # (B, N, heads, D)
        zq, zk, zv = (z.to(v.dtype).unflatten(1, grid) for z in (q, k, v))
        mask = None if valid is None else valid.unflatten(1, grid)
        if traced:
            rules = [AxisRule("counts", count) if count > 1 else AxisRule("whole") for count in self.spec.counts]
            y, _ = attend_rules(zq, zk, zv, rules, rules, key_valid=mask, kernel=self.spec.kernel)
        else:
            cuts = self.spec.cuts(grid)
            y, _ = attend_cuts(zq, zk, zv, cuts, cuts, key_valid=mask, kernel=self.spec.kernel)
        return self.scale * self.proj(y.flatten(1, 3).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, z: Tensor, weight: Tensor | None) -> Tensor:
        """(B, N, inner) → (B, N, heads, D), normed over all heads where there is a gain."""
        normed = z if weight is None else rms_norm(z, weight, NORM_EPS)
        return normed.unflatten(-1, (self.site.heads, -1))
