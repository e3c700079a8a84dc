"""A host and a softmax in fp64, straight from the formulas, for oracles.

Slow on purpose: masks are dense, heads are looped over, positions are given token by token. Nothing here is shared with
the code that runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec import Rope

NORM_EPS = 1e-6


def affine(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``x @ weight.T + bias`` with the tensors called ``name.weight`` and, where there is one, ``name.bias``."""
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def frequencies(
    channels: int, base: float, rule: str = "none", length: float = 1.0, trained: int | None = None
) -> tuple[Tensor, float]:
    """Frequencies (channels/2,) of one axis, and the factor on its cosines and sines.

    `rule` stretches them when `length` exceeds the `trained` length by s: ``interpolate`` divides every frequency by s,
    ``ntk`` enlarges the base to ``base * s**(d/(d-2))``, ``yarn`` interpolates the slow ones only (alpha 1, beta 32)
    and scales cosines and sines by ``0.1 ln s + 1``.
    """
    theta = [base ** (-2 * i / channels) for i in range(channels // 2)]
    stretch = 1.0 if trained is None else max(1.0, length / trained)
    magnitude = 1.0
    if rule == "interpolate":
        theta = [f / stretch for f in theta]
    elif rule == "ntk":
        if channels == 2:
            # the rule keeps the fastest wave and interpolates the slowest; a single wave is taken for the slowest
            theta = [f / stretch for f in theta]
        else:
            bigger = base * stretch ** (channels / (channels - 2))
            theta = [bigger ** (-2 * i / channels) for i in range(channels // 2)]
    elif rule == "yarn":
        if stretch > 1.0:
            assert trained is not None
            kept = [min(max((trained * f / (2 * math.pi) - 1.0) / 31.0, 0.0), 1.0) for f in theta]
            theta = [(1 - g) * f / stretch + g * f for g, f in zip(kept, theta, strict=True)]
            magnitude = 0.1 * math.log(stretch) + 1.0
    elif rule != "none":
        raise ValueError(f"unknown rope rule {rule!r}")
    return torch.tensor(theta, dtype=torch.float64), magnitude


@dataclass(frozen=True)
class ReferenceHost:
    """The host's side of one attention, from plain weights.

    `weights`: ``q.weight`` (width, C), ``q.bias``, the same for k, v and o, and ``norm_q.weight``, ``norm_k.weight``
    where the host has q/k norms: (width,) is a norm over all heads together, (D,) one per head. `picked` are the heads
    this attention computes, None means all.
    """

    weights: Mapping[str, Tensor]
    heads: int
    head_dim: int
    rope: Rope | None = None
    picked: tuple[int, ...] | None = None

    def of_heads(self, picked: Sequence[int]) -> ReferenceHost:
        """The same host seen by an attention that computes some of the heads."""
        return replace(self, picked=tuple(picked))

    def raw(self, x: Tensor, which: str) -> Tensor:
        """Raw projection of x (B, n, C): (B, n, all heads * D)."""
        return affine(self.weights, which, x)

    def split(self, raw: Tensor, which: str, positions: Tensor | None = None, **rule: object) -> Tensor:
        """Norm (q and k only), split and rotate: raw (B, n, all heads * D) → (B, n, heads, D).

        `positions` (n, 3) are the (t, h, w) of every token; None leaves it unrotated. `rule` goes to `rotate`.
        """
        gain = self.weights.get(f"norm_{which}.weight") if which != "v" else None
        if gain is not None and gain.numel() == raw.shape[-1]:
            raw = raw / torch.sqrt((raw * raw).mean(-1, keepdim=True) + NORM_EPS) * gain
        z = torch.stack([raw[..., i * self.head_dim : (i + 1) * self.head_dim] for i in range(self.heads)], dim=2)
        if gain is not None and gain.numel() != raw.shape[-1]:
            z = z / torch.sqrt((z * z).mean(-1, keepdim=True) + NORM_EPS) * gain
        if which != "v" and positions is not None:
            z = self.rotate(z, positions, **rule)  # type: ignore[arg-type]
        return z if self.picked is None else z[:, :, list(self.picked)]

    def rotate(
        self, z: Tensor, positions: Tensor, rule: str = "none", lengths: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> Tensor:
        """Rotary embedding of z (B, n, heads, D) at `positions` (n, 3); `lengths` are the axes' present lengths."""
        if self.rope is None:
            return z
        cosines, sines = [], []
        for axis, channels in enumerate(self.rope.axes):
            trained = None if self.rope.trained is None else self.rope.trained[axis]
            theta, magnitude = frequencies(channels, self.rope.base, rule, lengths[axis], trained)
            for f in theta:
                angle = positions[:, axis].double() * f
                cosines.append(magnitude * torch.cos(angle))
                sines.append(magnitude * torch.sin(angle))
        pairs = len(cosines)
        channels_out = list(z.unbind(-1))
        for i in range(pairs):
            a, b = (2 * i, 2 * i + 1) if self.rope.pairing == "interleaved" else (i, i + pairs)
            cos, sin = cosines[i][None, :, None], sines[i][None, :, None]
            channels_out[a] = z[..., a] * cos - z[..., b] * sin
            channels_out[b] = z[..., a] * sin + z[..., b] * cos
        return torch.stack(channels_out, dim=-1)

    def out(self, y: Tensor) -> Tensor:
        """Output projection: (B, n, heads * D) → (B, n, C)."""
        return affine(self.weights, "o", y)


def grid_of(grid: Sequence[int]) -> Tensor:
    """The (t, h, w) of every token, t-major: (N, 3) fp64."""
    t, h, w = grid
    rows = [(i, j, k) for i in range(t) for j in range(h) for k in range(w)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def scores(q: Tensor, k: Tensor, allowed: Tensor | None = None) -> Tensor:
    """``q k^T / sqrt(D)`` with minus infinity where not allowed: q (B, n, heads, D), k (B, m, heads, D) → (B, heads, n, m).

    `allowed` broadcasts to (B, heads, n, m).
    """
    out = torch.stack(
        [q[:, :, i] @ k[:, :, i].transpose(-1, -2) / math.sqrt(q.shape[-1]) for i in range(q.shape[2])], dim=1
    )
    return out if allowed is None else out.masked_fill(~allowed, float("-inf"))


def attend(logits: Tensor, v: Tensor) -> Tensor:
    """``softmax(logits) v``: (B, heads, n, m), (B, m, heads, D) → (B, n, heads*D). A row without any key is zero."""
    largest = logits.amax(-1, keepdim=True).detach()
    shifted = torch.exp(logits - largest.masked_fill(largest == float("-inf"), 0.0))
    total = shifted.sum(-1, keepdim=True)
    weights = shifted / total.masked_fill(total == 0, 1.0)
    return torch.cat([weights[:, i] @ v[:, :, i] for i in range(v.shape[2])], dim=-1)
