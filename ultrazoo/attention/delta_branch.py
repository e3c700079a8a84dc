"""The linear branch of Video DeltaNet: one D x D state per head, written frame by frame from both ends of the clip.

With features k, q (SiLU, unit length) and v (SiLU), per frame ``A = K^T diag(beta) K`` and ``B = V^T diag(beta) K``; rule
``vdn``: ``S_t = (S_{t-1} diag(alpha_t) + B_t) (I + A_t)^-1``, the minimiser of
``|S - S_{t-1} diag(alpha_t)|^2 + sum beta |S k - v|^2``. A frame reads, decayed to it, the state of the frames before its
window and the state of those after it, so that window and branch share every frame between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frame_windows import FrameWindows
from ..ops.init import Constant, Normal, Values
from ..ops.norm import rms_norm
from ..ops.precision import wide_dtype, without_autocast
from ..spec import Site
from .grouped import slab_tokens

TAPS = 5
EPS = 1e-6
TARGETS = {"none": (), "kv": ("k", "v"), "qkv": ("q", "k", "v")}
"""Projections that go through the short convolutions, by option `convolve`."""


class Taps(nn.Module):
    """Weights of a depthwise convolution without bias."""

    def __init__(self, channels: int, *kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, *kernel))

    def initial_values(self) -> dict[str, Any]:
        return {"weight": Normal(math.prod(self.weight.shape[1:]) ** -0.5)}


class ShortConv(nn.Module):
    """5 x 5 taps in every frame, then 5 taps over frames, per channel, zeros beyond the border."""

    def __init__(self, channels: int, targets: Sequence[str]):
        super().__init__()
        self.targets = tuple(targets)
        for name in self.targets:
            self.add_module(f"{name}_sp", Taps(channels, TAPS, TAPS))
            self.add_module(f"{name}_tm", Taps(channels, TAPS))

    def forward(self, z: Tensor, name: str) -> Tensor:
        """(B, F, H, W, C) → the same shape."""
        batch, frames, height, width, channels = z.shape
        space, time = getattr(self, f"{name}_sp").weight, getattr(self, f"{name}_tm").weight
        z = z.flatten(0, 1).permute(0, 3, 1, 2)  # (B*F, C, H, W), channels last in memory
        z = F.conv2d(z, space, padding=TAPS // 2, groups=channels)
        # frames as rows and tokens as columns of one picture
        z = z.permute(0, 2, 3, 1).reshape(batch, frames, height * width, channels).permute(0, 3, 1, 2)
        z = F.conv2d(z, time.unsqueeze(-1), padding=(TAPS // 2, 0), groups=channels)
        return z.permute(0, 2, 3, 1).unflatten(2, (height, width))


class FrameDecay(nn.Module):
    """``log alpha = -exp(A_log) softplus(up(down(mean x)) + dt_bias)`` per frame, head and key channel."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.down = nn.Linear(dim, head_dim, bias=False)
        self.up = nn.Linear(head_dim, heads * head_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * head_dim))

    def initial_values(self) -> dict[str, Any]:
        """Evenly spaced quantiles of the published laws: exp(A_log) uniform in 1..16, softplus(dt_bias) log-uniform in
        1e-3..0.1."""
        heads, inner = self.A_log.numel(), self.dt_bias.numel()
        rates = [math.log(1 + 15 * (i + 0.5) / heads) for i in range(heads)]
        steps = [math.exp(math.log(1e-3) + math.log(100) * (i + 0.5) / (inner // heads)) for i in range(inner // heads)]
        bias = [step + math.log(-math.expm1(-step)) for step in steps]
        return {"A_log": Values(tuple(rates)), "dt_bias": Values(tuple(bias) * heads)}

    def forward(self, mean: Tensor) -> Tensor:
        """(B, F, C) → (B, F, heads, D), in the dtype of `mean`."""
        wide = mean.dtype
        step = F.linear(F.linear(mean, self.down.weight.to(wide)), self.up.weight.to(wide)) + self.dt_bias.to(wide)
        rate = self.A_log.to(wide).exp()
        return -rate[:, None] * F.softplus(step).unflatten(-1, (rate.shape[0], -1))


class LowRankGate(nn.Module):
    """``sigmoid(up(down(x)))``: (…, C) → (…, heads*D)."""

    def __init__(self, dim: int, rank: int, inner: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)).sigmoid()  # type: ignore[no-any-return]


class ReadoutNorm(nn.Module):
    """RMS norm over the channels of a head."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))

    def initial_values(self) -> dict[str, Any]:
        return {"weight": Constant(1.0)}

    def forward(self, z: Tensor) -> Tensor:
        return rms_norm(z, self.weight.to(z.dtype), EPS)


class DeltaBranch(nn.Module):
    """``branch(x, raw, size, valid, windows)``: what each frame that is no anchor reads of the frames beyond its window.

    Parameters carry the names of the released checkpoints below `linear_attention`.
    """

    def __init__(self, site: Site, rule: str, convolve: str):
        super().__init__()
        self.heads, self.head_dim, self.rule = site.heads, site.head_dim, rule
        targets = TARGETS[convolve]
        self.short_conv = ShortConv(site.inner, targets) if targets else None
        self.alpha = FrameDecay(site.dim, site.heads, site.head_dim)
        self.beta_proj = nn.Linear(site.dim, site.heads, bias=False)
        self.output_gate = LowRankGate(site.dim, site.head_dim, site.inner)
        self.norm = ReadoutNorm(site.head_dim)

    def forward(
        self, x: Tensor, raw: dict[str, Tensor], valid: Tensor | None, windows: FrameWindows, out: nn.Module
    ) -> Tensor:
        """x (B, F, H, W, C), raw q, k, v (B, F, H, W, heads*D) and valid (B, F, H, W) of the frames that are no anchors
        → (B, F*H*W, C), through the output projection `out`. Takes the raw projections out of `raw`."""
        maps = {name: self._mixed(raw.pop(name), name, valid) for name in tuple(raw)}
        beta = self.beta_proj(x).sigmoid()
        if valid is not None:
            # a token that is not real writes nothing
            beta = beta * valid.unsqueeze(-1)
        with without_autocast(x.device):
            log_alpha = self.alpha(_frame_means(x, valid))  # (B, F, heads, D)
            transition, injection = self._factors(maps.pop("k"), maps.pop("v"), beta, log_alpha)
            before, after = self._states(transition, injection, windows)
        rows, first = [], windows.inner[0]
        for window in windows.windows:
            states = (before.get(window.low - 1 - first), after.get(window.high - first))
            span = slice(window.start - first, window.stop - first)
            if states == (None, None):
                rows.append(torch.zeros_like(x[:, span]).flatten(1, 3))
                continue
            bridged = self._bridged(states, log_alpha, span, max(window.low - first, 0), window.high - first)
            for frames in self._slabs(maps["q"], span.start, span.stop):
                part = slice(frames.start - span.start, frames.stop - span.start)
                with without_autocast(x.device):
                    read = self._read(maps["q"][:, frames], bridged[:, part])
                gated = read.to(x.dtype) * self.output_gate(x[:, frames])
                rows.append(out(gated.flatten(1, 3)))
        return torch.cat(rows, 1)

    def _mixed(self, z: Tensor, name: str, valid: Tensor | None) -> Tensor:
        """A raw projection after its short convolution and SiLU: (B, F, H, W, heads*D)."""
        if self.short_conv is not None and name in self.short_conv.targets:
            if valid is not None:
                z = z.masked_fill(~valid.unsqueeze(-1), 0.0)
            z = self.short_conv(z, name)
        return F.silu(z)

    def _by_head(self, z: Tensor) -> Tensor:
        """(B, F, H, W, heads*D) → (B, F, heads, H*W, D) in the wide dtype."""
        z = z.flatten(2, 3).unflatten(-1, (self.heads, self.head_dim)).transpose(2, 3)
        return z.to(wide_dtype(z.dtype))

    def _slabs(self, z: Tensor, start: int, stop: int) -> Iterable[slice]:
        """Frames start..stop, some at a time, so that wide copies stay small."""
        step = stop - start
        if not torch.compiler.is_compiling():
            frame_bytes = 4 * z.shape[0] * z.shape[4] * z.shape[2] * z.shape[3]
            step = max(1, slab_tokens(z.device, frame_bytes))
        return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]

    def _factors(self, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor) -> tuple[Tensor, Tensor]:
        """What a frame does to a state [d_v, d_k], ``S → S @ transition + injection``: two (B, F, heads, D, D)."""
        squares, products = [], []
        for frames in self._slabs(k, 0, k.shape[1]):
            keys = F.normalize(self._by_head(k[:, frames]), dim=-1, eps=EPS)
            write = beta[:, frames].flatten(2, 3).transpose(2, 3).to(keys.dtype)  # (B, F, heads, H*W)
            written = keys * write.unsqueeze(-1)
            squares.append(written.mT @ keys)
            products.append(self._by_head(v[:, frames]).mT @ written)
        A, B = torch.cat(squares, 1), torch.cat(products, 1)
        tokens = k.shape[2] * k.shape[3]
        eye = torch.eye(self.head_dim, dtype=A.dtype, device=A.device)
        alpha = log_alpha.exp().unsqueeze(-1)
        if self.rule == "sana_scaled":
            return alpha * (eye - A / tokens), B / tokens**0.5
        if self.rule == "vdn_scaled":
            A, B = A / tokens, B / tokens**0.5
        # I + A is positive definite; the checked form would wait for the device
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(A + eye).L)
        return alpha * inverse, B @ inverse

    def _states(
        self, transition: Tensor, injection: Tensor, windows: FrameWindows
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """States that some window asks for: after frames 0..t of the branch, and after its last frame back to t."""
        first, last = windows.inner[0], transition.shape[1] - 1
        before = {window.low - first - 1 for window in windows.windows} & set(range(last + 1))
        after = {window.high - first for window in windows.windows} & set(range(last + 1))
        forth = _scan(transition, injection, range(max(before, default=-1) + 1), before)
        back = _scan(transition, injection, range(last, min(after, default=last + 1) - 1, -1), after)
        return forth, back

    def _bridged(
        self, states: tuple[Tensor | None, Tensor | None], log_alpha: Tensor, span: slice, low: int, high: int
    ) -> Tensor:
        """The state that each frame of `span` reads, (B, frames, heads, d_v, d_k): both sides decayed to it.

        From the left by alpha of frames low..t, from the right by alpha of t..high-1, per key channel. Logs are summed
        over the window alone: differences of sums over the whole clip would lose digits.
        """
        own = log_alpha[:, span]
        parts = []
        if states[0] is not None:
            decay = log_alpha[:, low : span.start].sum(1, keepdim=True) + own.cumsum(1)
            parts.append(states[0].unsqueeze(1) * decay.exp().unsqueeze(-2))
        if states[1] is not None:
            decay = log_alpha[:, span.stop : high].sum(1, keepdim=True) + own.flip(1).cumsum(1).flip(1)
            parts.append(states[1].unsqueeze(1) * decay.exp().unsqueeze(-2))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _read(self, q: Tensor, state: Tensor) -> Tensor:
        """(B, F, H, W, heads*D) and (B, F, heads, d_v, d_k) → (B, F, H, W, heads*D)."""
        height, width = q.shape[2:4]
        read = F.normalize(self._by_head(q), dim=-1, eps=EPS) @ state.mT
        return self.norm(read).transpose(2, 3).flatten(3).unflatten(2, (height, width))


def _scan(transition: Tensor, injection: Tensor, order: Iterable[int], wanted: set[int]) -> dict[int, Tensor]:
    """Run the states through frames in `order` from zero; those after the frames `wanted`, by frame."""
    state: Tensor | None = None
    kept = {}
    for t in order:
        state = injection[:, t] if state is None else injection[:, t] + state @ transition[:, t]
        if t in wanted:
            kept[t] = state
    return kept


def _frame_means(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the real tokens of each frame in the wide dtype, zero where there are none: (B, F, H, W, C) → (B, F, C)."""
    wide = wide_dtype(x.dtype)
    if valid is None:
        return x.mean((2, 3), dtype=wide)
    total = x.masked_fill(~valid.unsqueeze(-1), 0.0).sum((2, 3), dtype=wide)
    return total / valid.sum((2, 3)).clamp(min=1).to(wide).unsqueeze(-1)


def branch_parameters(site: Site, convolve: str) -> int:
    """Parameters of `DeltaBranch`."""
    dim, inner, rank = site.dim, site.inner, site.head_dim
    conv = len(TARGETS[convolve]) * inner * (TAPS * TAPS + TAPS)
    decay = rank * (dim + inner) + site.heads + inner
    return conv + decay + dim * site.heads + rank * (dim + inner) + inner + rank


def branch_flops(site: Site, rule: str, convolve: str, windows: FrameWindows) -> tuple[int, int]:
    """(matmuls, convolutions) of `DeltaBranch` and its output projection, batch 1. Cholesky factors are neither.

    3 N D multiply-adds per channel for A, B and the readout, D^3 per head for each frame of each scan.
    """
    dim, inner, rank = site.dim, site.inner, site.head_dim
    first, last = windows.inner
    frames, per_frame = last - first, site.grid.h * site.grid.w
    tokens = frames * per_frame
    beyond = [windows.beyond(window) for window in windows.windows]
    read = sum(
        (window.stop - window.start) * per_frame
        for window, (left, right) in zip(windows.windows, beyond, strict=True)
        if left[0] < left[1] or right[0] < right[1]
    )
    # the first frame of a scan is its injection
    scanned = sum(max(0, max(stop - start for start, stop in side) - 1) for side in zip(*beyond, strict=True))
    solved = 0 if rule == "sana_scaled" else frames
    cube = site.heads * rank**3
    matmuls = tokens * dim * site.heads + frames * rank * (dim + inner) + 2 * tokens * rank * inner
    matmuls += cube * (solved + scanned) + read * (rank * inner + rank * (dim + inner) + inner * dim)
    taps = len(TARGETS[convolve]) * tokens * inner * (TAPS * TAPS + TAPS)
    return 2 * matmuls, 2 * taps
