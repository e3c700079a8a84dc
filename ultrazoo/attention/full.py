"""Full attention: every token sees every token (Vaswani et al., arXiv 1706.03762, equation 1). The reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..errors import Problem, listed
from ..grid import Grid
from ..ops.blocks import Blocks
from ..ops.partition import AxisRule
from ..ops.runs import whole
from ..ports import EXPORTS
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Site, Start, Traits, option
from .contract import Attention, Call, Host, grid_positions, refuse_segments
from .grouped import attend_cuts, attend_extra, attend_rules

WHOLE = AxisRule("whole")


@dataclass(frozen=True, kw_only=True)
class FullSpec(AttentionSpec):
    """Softmax attention over the whole grid and all extra tokens, through the host's projections."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "Vaswani et al., arXiv 1706.03762"
    formula: ClassVar[str] = "y = W_o softmax(Q K^T / sqrt(D)) V"

    kernel: str = option("auto", "a registered kernel, or auto")

    def problems(self, site: Site) -> list[Problem]:
        return kernel_problems(self.kernel)

    def cost(self, site: Site) -> Cost:
        return dense_cost(site)

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(tokens.any(axis=1, keepdims=True), tokens.shape)

    def traits(self) -> Traits:
        return Traits(
            start=Start("exact", "the host's own attention"), exact_at_init=True, export=EXPORTS, min_grid=(1, 1, 1)
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        return [
            (cls(), Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True)),
            (cls(), Site(dim=20, heads=3, head_dim=8, grid=Grid(1, 4, 5), has_timestep=False)),
        ]


def kernel_problems(
    kernel: str, passes: Collection[str] = (), queries: Blocks | None = None, keys: Blocks | None = None
) -> list[Problem]:
    """A kernel name that nobody registered, or a kernel that runs on no machine for a design that always passes these
    inputs (words of `KernelSpec.takes`), and these blocks of queries and keys where it passes a map of them."""
    from .. import registry
    from ..errors import RegistryError

    if kernel == "auto":
        return []
    try:
        spec = registry.find("kernel", kernel)
        why = spec.never(passes, queries, keys)
    except RegistryError as error:
        return [Problem("kernel", str(error))]
    if not why:
        return []
    others = [row.name for row in registry.entries("kernel") if row.builtin]
    able = [name for name in others if not registry.find("kernel", name).never(passes, queries, keys)]
    return [
        Problem("kernel", f"{kernel!r} can never run for this design: {'; '.join(why)}", f"use auto, {listed(able)}")
    ]


def dense_cost(site: Site) -> Cost:
    """Cost of full attention over N grid and M extra tokens: pairs (N + M)²."""
    tokens, total = site.tokens, site.tokens + site.extra_tokens
    pairs = total * total
    attention = 4 * pairs * site.inner
    return Cost(
        pairs=pairs,
        attention_flops=attention,
        qkv_flops=2 * tokens * site.dim * 3 * site.width,
        out_flops=2 * tokens * site.inner * site.dim,
        peak_elements=5 * tokens * site.width,
        # the input, q, k, v and the output; q and k once more before their norm
        saved_elements=(5 + 2 * site.qk_norm) * tokens * site.width + tokens * site.heads,
        branches=(BranchCost("full", pairs, attention, 2 * tokens * site.dim * 3 * site.width),),
    )


class FullAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        grid = call.grid
        positions = grid_positions(grid, x.device)
        q, k, v = host.heads(*host.project(x, "qkv"), positions)  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        valid = None if call.key_valid is None else call.key_valid.unflatten(1, grid)
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        common: Any = {"extra": call.extra, "key_valid": valid, "kernel": spec.kernel}
        zq, zk, zv = (z.unflatten(1, grid) for z in (q, k, v))
        if self.traced:
            y, _ = attend_rules(zq, zk, zv, (WHOLE,) * 3, (WHOLE,) * 3, **common)
        else:
            cuts = (whole(grid[0]), whole(grid[1]), whole(grid[2]))
            y, _ = attend_cuts(zq, zk, zv, cuts, cuts, **common)
        out = host.out(y.flatten(1, 3).flatten(2))
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, k, v, call.key_valid, spec.kernel)


FullSpec.module = FullAttention
