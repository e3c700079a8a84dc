"""Divided space-time attention: over time at each place, then inside each frame (TimeSformer, Bertasius et al.,
arXiv 2102.05095, section 3.2, equations 7 to 9, and the released code).

The paper's block does ``x' = x + r(x)``, ``x'' = x' + attention_in_frame(norm(x'))``, where the temporal residual
``r = fc(proj(attention_over_time(LN(x))))`` has its own norm, projections and a last matrix ``temporal_fc`` that starts at
zero. An attention here is given the host's normed (and modulated) stream z and returns what the host adds to its stream,
so both residuals come out as one sum: ``y = r(z) + attention_in_frame(z + r(z))``.

Where we depart, because the host's norm lies outside: r reads LN(z) (which is LN(x) on a host whose norm has no gains, as
LN of LN changes nothing but epsilon); the spatial part reads z + r and not norm(x + r); a host's gate scales both parts.
The temporal projections are the block's own and start as copies of the host's, as the released code starts them from an
image model; its temporal norm, a copy of the image model's there, starts plain. Norms of q and k and the rotary embedding,
which TimeSformer does not have, are the host's for both parts. Extra tokens are seen by the spatial part alone, as the class
token is; extra queries see all frames at once, where the released code takes the mean over frames of what they see in each.

At the start the block is exactly attention inside each frame, and full attention only of a single frame. One frame: the
softmax over one key is 1, and r = fc(proj(v)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid
from ..ops.init import Constant, Copy, marked
from ..ops.partition import AxisRule
from ..ops.runs import exact, whole
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Extra, Host, grid_positions, refuse_segments
from .full import kernel_problems
from .grouped import attend_cuts, attend_extra, attend_rules

NORM_EPS = 1e-6
NAMES = ("q", "k", "v")
WHOLE, SINGLE = AxisRule("whole"), AxisRule("size", 1)
SAME_PLACE, SAME_FRAME = (False, True, True), (True, False, False)


@dataclass(frozen=True, kw_only=True)
class DividedSpec(AttentionSpec):
    """Attention over time with projections of its own, then inside each frame with the host's."""

    name: ClassVar[str] = "divided"
    source: ClassVar[str] = "TimeSformer, arXiv 2102.05095, section 3.2"
    formula: ClassVar[str] = "y = r + W_o attention_in_frame(x + r), r = W_fc W_p attention_over_time(LN(x))"

    kernel: str = option("auto", "a registered kernel, or auto")

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        if site.host_heads is not None:
            rule = "the temporal residual goes to the stream beside the output projection, which head groups share"
            found.append(Problem("", rule, "use divided for all heads of a layer"))
        return found

    def cost(self, site: Site) -> Cost:
        tokens, dim, inner, extra = site.tokens, site.dim, site.inner, site.extra_tokens
        over_time = tokens * site.grid.t
        in_frame = tokens * (site.grid.h * site.grid.w + extra) + extra * (tokens + extra)
        project, mix = 2 * tokens * dim * 3 * inner, 2 * tokens * dim * (inner + dim)
        parameters = 2 * dim + 3 * inner * (dim + 1) + dim * (inner + 1) + dim * (dim + 1)
        pairs = over_time + in_frame
        return Cost(
            pairs=pairs,
            attention_flops=4 * pairs * inner,
            # the host projects what the temporal part has changed
            projection_flops=2 * project,
            out_flops=2 * tokens * inner * dim,
            other_flops=mix,
            parameters=parameters,
            peak_elements=5 * tokens * inner + 3 * tokens * dim,
            saved_elements=(10 + 4 * site.qk_norm) * tokens * inner + 4 * tokens * dim + 2 * tokens * site.heads,
            branches=(
                BranchCost("time", over_time, 4 * over_time * inner, project, mix, parameters),
                BranchCost("space", in_frame, 4 * in_frame * inner, project),
            ),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        # every key of a frame has seen its place in all frames
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(tokens.any(axis=1, keepdims=True), tokens.shape)

    def traits(self) -> Traits:
        return Traits(
            start=Start(
                "needs tuning", "TimeSformer: fresh, it attends inside each frame, as the image model it starts from"
            ),
            min_grid=(1, 1, 1),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 3, 5), rope=rope, qk_norm=True)
        plain = Site(dim=16, heads=2, head_dim=8, grid=Grid(4, 2, 3), extra=(Segment("class", 1),))
        return [
            (cls(), site),
            (cls(), plain),
            (cls(), Site(dim=20, heads=2, head_dim=10, grid=Grid(2, 4, 3), has_timestep=False)),
        ]


class DividedAttention(Attention):
    """(B, N, C) → (B, N, C), the temporal residual included; with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: DividedSpec, site: Site):
        super().__init__(spec, site)
        self.temporal_norm = nn.LayerNorm(site.dim, eps=NORM_EPS)
        self.temporal = nn.ModuleDict({name: _copy(name, site.dim, site.inner) for name in NAMES})
        self.temporal_proj = _copy("o", site.inner, site.dim)
        self.temporal_fc = marked(nn.Linear(site.dim, site.dim), weight=Constant(0.0), bias=Constant(0.0))

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        grid, valid = call.grid, call.key_valid
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
            valid = valid.unflatten(1, grid)
        residual = self.temporal_fc(self.temporal_proj(self._over_time(x, host, grid, valid)))  # (B, N, C)
        raw: Any = host.project(x + residual, "qkv")
        in_frame, k, v = self._attend(raw, host, grid, valid, SAME_FRAME, call.extra)
        del raw
        y = host.out(in_frame) + residual
        if call.extra is None:
            return y
        return y, attend_extra(call.extra, k, v, call.key_valid, spec.kernel)

    def _over_time(self, x: Tensor, host: Host, grid: tuple[int, int, int], valid: Tensor | None) -> Tensor:
        """The temporal part before its output projection: (B, N, heads*D)."""
        normed = self.temporal_norm(x)
        q, k, v = (self.temporal[name](normed) for name in NAMES)
        del normed
        return self._attend((q, k, v), host, grid, valid, SAME_PLACE)[0]

    def _attend(
        self,
        raw: tuple[Tensor, Tensor, Tensor],
        host: Host,
        grid: tuple[int, int, int],
        valid: Tensor | None,
        same: tuple[bool, bool, bool],
        extra: Extra | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention among tokens that are the `same` on some axes: raw q, k, v (B, N, width) → (B, N, heads*D), and the
        k and v (B, N, heads, D) attended to."""
        spec: Any = self.spec
        q, k, v = host.heads(*raw, grid_positions(grid, raw[0].device))
        assert q is not None and k is not None and v is not None
        zq, zk, zv = (z.unflatten(1, grid) for z in (q, k, v))
        common: Any = {"extra": extra, "key_valid": valid, "kernel": spec.kernel}
        if self.traced:
            rules = [SINGLE if one else WHOLE for one in same]
            y, _ = attend_rules(zq, zk, zv, rules, rules, **common)
        else:
            t, h, w = (exact(length, 1) if one else whole(length) for length, one in zip(grid, same, strict=True))
            y, _ = attend_cuts(zq, zk, zv, (t, h, w), (t, h, w), **common)
        return y.flatten(1, 3).flatten(2), k, v


def _copy(name: str, inputs: int, outputs: int) -> nn.Module:
    """A linear that starts as a copy of the host's."""
    return marked(nn.Linear(inputs, outputs), weight=Copy(f"{name}.weight"), bias=Copy(f"{name}.bias"))


DividedSpec.module = DividedAttention
