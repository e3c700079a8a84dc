"""Video DeltaNet (VDN): softmax in windows of whole frames, and a delta-rule state for exactly the frames beyond them.

``y = W_o (g * softmax over window and anchors) + W_lin readout``. Source: code OpenVDN/vdn-minimax-h3 on MiniMax-H3 (id
2609.20744 second-hand). Frame t sees the chunks next to its own; the first and the last frame are anchors, dense as rows and
as columns, and take no part in the linear branch (see `delta_branch`), which reads raw q, k, v. A window that holds every
frame leaves gated full attention: the branch is off.

We depart from the released code in five places. Its scans start from the prompt, written once as a chunk of its own; extra
tokens come here normed, rotated and without hidden states, so our text state is zero. For the same reason extra rows are
dense but not gated. Parameters of the decay follow the model's dtype (the arithmetic is fp32). Any batch works, and tokens
that are not real are never written. `convolve: qkv`, `gate: none` and `init: zero` are there for trying: with the last two,
ours, a fresh block is the window softmax alone, and full attention where the window holds every frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid
from ..kernels import attend
from ..ops.frame_windows import FrameWindows, Range
from ..ops.init import Constant, marked
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Extra, Host, grid_positions, refuse_segments
from .delta_branch import DeltaBranch, branch_flops, branch_parameters
from .full import kernel_problems
from .grouped import attend_extra

GATE_START = 0.99
"""The published gate leaves the softmax almost as it was."""


@dataclass(frozen=True, kw_only=True)
class DeltaSpec(AttentionSpec):
    """Windows over chunks of frames, anchor frames, and the video delta rule over the rest."""

    name: ClassVar[str] = "delta"
    source: ClassVar[str] = "VDN, code OpenVDN/vdn-minimax-h3 (id 2609.20744 second-hand)"
    formula: ClassVar[str] = (
        "y = W_o (g softmax_window(Q K^T / sqrt(D)) V) + W_lin (G rms(q S^T)), S_t = (S_{t-1} diag(a_t) + B_t) (I + A_t)^-1"
    )

    chunk: int = option(5, "frames per chunk", ge=1)
    radius: int = option(1, "chunks that a chunk sees on either side", ge=0)
    anchors: Literal["both", "none"] = option(
        "both", "the first and the last frame: dense as rows and columns, or frames like any other"
    )
    rule: Literal["vdn", "sana_scaled", "vdn_scaled"] = option(
        "vdn",
        "how a frame changes the state: exact solve, first order in A/S, or exact solve with A/S; S tokens a frame",
    )
    convolve: Literal["none", "kv", "qkv"] = option("kv", "raw projections that go through the short convolutions")
    gate: Literal["sigmoid", "none"] = option("sigmoid", "gate of the softmax per token and head; none is 1")
    init: Literal["random", "zero"] = option(
        "random", "the second output projection starts as torch starts it, or at zero (ours)"
    )
    kernel: str = option("auto", "a registered kernel, or auto")

    def windows(self, frames: int) -> FrameWindows:
        return FrameWindows(frames, self.chunk, self.radius, self.anchors == "both")

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        if site.host_heads is not None:
            rule = "delta adds a second output projection to the stream, which a group of heads does not have"
            found.append(Problem("", rule, "give it all heads of the layer"))
        return found

    def cost(self, site: Site) -> Cost:
        tokens, dim, inner, extra = site.tokens, site.dim, site.inner, site.extra_tokens
        windows, per_frame = self.windows(site.grid.t), site.grid.h * site.grid.w
        pairs = windows.pairs(per_frame, extra) + extra * (tokens + extra)
        attention, qkv = 4 * pairs * inner, 2 * tokens * dim * 3 * site.width
        gated = self.gate == "sigmoid"
        matmuls, convolutions = 0, 0
        # fp32 beside a 16-bit stream counts twice: states, and the features of the frames that are read at a time
        states = 2 * site.grid.t * site.heads * site.head_dim**2
        if not windows.covered:
            matmuls, convolutions = branch_flops(site, self.rule, self.convolve, windows)
        owned = branch_parameters(site, self.convolve) + inner * dim
        gate = dim * site.heads + site.heads if gated else 0
        return Cost(
            pairs=pairs,
            attention_flops=attention,
            qkv_flops=qkv,
            out_flops=2 * tokens * inner * dim,
            other_flops=matmuls + convolutions + (2 * tokens * dim * site.heads if gated else 0),
            parameters=owned + gate,
            peak_elements=10 * tokens * site.width + 4 * states,
            saved_elements=(38 + 2 * site.qk_norm) * tokens * site.width + 8 * states,
            branches=(
                BranchCost("window", pairs, attention, qkv, 0, gate),
                BranchCost("linear", 0, 0, 0, convolutions, owned),
            ),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        # the branch reads what the window does not hold
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(tokens.any(axis=1, keepdims=True), tokens.shape)

    def traits(self) -> Traits:
        return Traits(
            start=Start(
                "needs tuning", "OpenVDN/vdn-minimax-h3: LoRA and branch, 2000 steps, then 250 of distillation"
            ),
            export=(),
            min_grid=(1, 1, 1),
            notes="the scans run frame by frame, so the number of frames is a plain int; the text state is zero",
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(6, 2, 3), rope=rope, qk_norm=True)
        text = site.at(grid=Grid(9, 1, 3), qk_norm=False, extra=(Segment("text", 4),))
        bare = site.at(grid=Grid(5, 3, 2), rope=None, has_timestep=False)
        return [
            (cls(chunk=1), site),
            (cls(chunk=2, rule="sana_scaled", convolve="qkv"), text),
            (cls(chunk=2, radius=0, anchors="none", rule="vdn_scaled", gate="none", init="zero"), bare),
        ]


class SoftmaxGate(nn.Module):
    """``sigmoid(up(x))`` per token and head: (B, N, C) → (B, N, heads). Starts at 0.99 whatever x is."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        start = math.log(GATE_START / (1 - GATE_START))
        self.up = marked(nn.Linear(dim, heads), weight=Constant(0.0), bias=Constant(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).sigmoid()  # type: ignore[no-any-return]


class DeltaAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: DeltaSpec, site: Site):
        super().__init__(spec, site)
        self.linear_attention = DeltaBranch(site, spec.rule, spec.convolve)
        self.to_out_linear: nn.Module = nn.Linear(site.inner, site.dim, bias=False)
        if spec.init == "zero":
            marked(self.to_out_linear, weight=Constant(0.0))
        self.softmax_gate = SoftmaxGate(site.dim, site.heads) if spec.gate == "sigmoid" else None

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        windows = spec.windows(call.grid[0])
        raw = dict(zip("qkv", host.project(x, "qkv"), strict=True))
        q, k, v = host.heads(*raw.values(), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        y = self._in_windows(q, k, v, windows, call)
        y_extra = None if call.extra is None else attend_extra(call.extra, k, v, call.key_valid, spec.kernel)
        # the branch reads the raw projections alone
        del q, k, v
        if self.softmax_gate is not None:
            y = y * self.softmax_gate(x).unsqueeze(-1)
        out = host.out(y.flatten(2))
        del y
        if not windows.covered:
            out = out + self._beyond(x, raw, windows, call)
        return out if y_extra is None else (out, y_extra)

    def _in_windows(self, q: Tensor, k: Tensor, v: Tensor, windows: FrameWindows, call: Call) -> Tensor:
        """Softmax of every frame's tokens over the frames it sees and all extra keys: (B, N, heads, D)."""
        spec: Any = self.spec
        per_frame = call.grid[1] * call.grid[2]
        found = []
        for queries, keys in windows.rows:
            valid = None if call.key_valid is None else _frames(call.key_valid, keys, per_frame)
            # the keys of one window go before those of the next are gathered
            seen = (_frames(z, at, per_frame) for z, at in ((q, queries), (k, keys), (v, keys)))
            found.append(_softmax(*seen, valid, call.extra, spec.kernel))
        if windows.anchors and len(found) > 1:
            ends, *rest = found
            found = [ends[:, :per_frame], *rest, ends[:, per_frame:]]
        return torch.cat(found, dim=1)

    def _beyond(self, x: Tensor, raw: dict[str, Tensor], windows: FrameWindows, call: Call) -> Tensor:
        """What the linear branch adds to the stream: (B, N, C), zero for anchors. `raw` is empty afterwards: projections go
        as soon as they were read."""
        first, last = windows.inner
        frames, height, width = call.grid

        def inner(z: Tensor) -> Tensor:
            return z.unflatten(1, (frames, height, width))[:, first:last]

        for name, z in raw.items():
            raw[name] = inner(z)
        valid = None if call.key_valid is None else inner(call.key_valid)
        found = self.linear_attention(inner(x), raw, valid, windows, self.to_out_linear)
        around = (first * height * width, (frames - last) * height * width)
        return nn.functional.pad(found, (0, 0, *around))


def _frames(z: Tensor, ranges: Sequence[Range], per_frame: int) -> Tensor:
    """The tokens of some frames: (B, N, …) → (B, n, …)."""
    parts = [z[:, start * per_frame : stop * per_frame] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _softmax(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, extra: Extra | None, kernel: str) -> Tensor:
    """q (B, n, heads, D) over k, v (B, m, heads, D) and the extra keys: (B, n, heads, D)."""
    if extra is not None:
        if valid is not None or extra.key_mask is not None:
            own = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if valid is None else valid
            more = torch.ones_like(extra.k[..., 0, 0], dtype=torch.bool) if extra.key_mask is None else extra.key_mask
            valid = torch.cat([own, more], dim=1)
        k, v = torch.cat([k, extra.k], dim=1), torch.cat([v, extra.v], dim=1)
    mask = None if valid is None else valid[:, None, None]
    y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), key_mask=mask, kernel=kernel)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


DeltaSpec.module = DeltaAttention
