"""The rotary embedding of LTX and LTX-2 over physical coordinates, and hosts that turn by tables of their own.

Each axis measures x in seconds or pixels, as a share of a base length; pair ``3 f + axis`` of all channels turns by
``(2 x - 1) * pi / 2 * theta**(f / (F - 1))``, F = C // 6. Pairs are counted over all channels before the head split, the
C/2 - 3F that are left over come first and do not turn; so every head has frequencies of its own. A pair is two neighbours
(interleaved), or channels i and i + D/2 of a head (halves).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention.contract import Positions
from ...spec import Rope, Site
from ..adapter import Config, Frame
from .host import ModuleHost


def physical_site(config: Config, base: float, pairing: Any) -> Site:
    """Dimensions; the rope says that there is one, on which base. Its channels per axis are a head's share, rounded."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    axis = 2 * (head_dim // 6)
    rope = Rope(axes=(axis, axis, axis), base=base, pairing=pairing)
    return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=True, rope=rope)


class TableHost(ModuleHost):
    """A host that turns by a `table` of its own, whose heads may differ."""

    def table(self, at: Positions, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, heads or 1, D/2) of the grid at physical positions, as wide as `like` and at least fp32."""
        raise TypeError(f"{type(self).__name__} has no table")

    def turned(self, z: Tensor, norm: Callable[[Tensor], Tensor] | None, at: Positions) -> Tensor:
        z = z if norm is None else norm(z)
        return self._turn(z.unflatten(-1, (-1, self.site.head_dim)), at)

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        return z if self.site.rope is None else self._turn(z, self.frame.physical(positions))

    def rotate_heads(self, z: Tensor, positions: Positions, heads: Sequence[int]) -> Tensor:
        """Rotate (B, n, len(heads), D), which are those `heads` of the model."""
        return z if self.site.rope is None else self._turn(z, self.frame.physical(positions), heads)

    def _turn(self, z: Tensor, at: Positions, heads: Sequence[int] | None = None) -> Tensor:
        cos, sin = self.table(at, z)
        if heads is not None and cos.shape[1] > 1:
            cos, sin = cos[:, list(heads)], sin[:, list(heads)]
        assert self.site.rope is not None
        return turned(z, cos, sin, self.site.rope.pairing)


class PhysicalHost(TableHost):
    """A host whose heads turn by different frequencies. `double`: frequencies are made in fp64, then rounded to fp32."""

    def __init__(self, attn: nn.Module, frame: Frame, site: Site, *, double: bool = False):
        super().__init__(attn, frame, site, across=True)
        self.double = double

    def table(self, at: Positions, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, heads, D/2).

        The angles reach thousands of turns: they are rounded to fp32 just as the model rounds its own.
        """
        assert self.site.rope is not None
        dim = self.site.width
        speed = speeds(dim // 6, self.site.rope.base, like.device, self.double)
        angles = [(one.float() * 2 - 1)[:, None] * speed for one in (at.t, at.h, at.w)]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        still = dim // 2 - 3 * (dim // 6)
        cos, sin = (
            F.pad(_mixed([function(one).to(wide) for one in angles]), (still, 0), value=rest)
            for function, rest in ((torch.cos, 1.0), (torch.sin, 0.0))
        )
        split = (-1, self.site.head_dim // 2)
        return cos.unflatten(-1, split), sin.unflatten(-1, split)


def speeds(count: int, base: float, device: torch.device, double: bool) -> Tensor:
    """`count` frequencies from pi/2 to pi/2 * base, evenly spaced in their logarithm, fp32 (count,)."""
    dtype = torch.float64 if double else torch.float32
    spaced = torch.linspace(0.0, 1.0, count, dtype=dtype, device=device)
    return (base**spaced * math.pi / 2.0).float()


def _mixed(axes: Sequence[Tensor]) -> Tensor:
    """Values of the axes (T, F), (H, F), (W, F) → (T*H*W, 3F), the axes innermost."""
    t, h, w = axes
    shape = (len(t), len(h), len(w), -1)
    parts = t[:, None, None].expand(shape), h[None, :, None].expand(shape), w[None, None].expand(shape)
    return torch.stack(parts, dim=-1).flatten(3).flatten(0, 2)


def turned(z: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Rotate (B, n, heads, D) by tables (…, n, heads, D/2), pairs ``interleaved`` or ``halves`` within a head."""
    part = z.to(cos.dtype)
    if pairing == "interleaved":
        a, b = part.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(z.dtype)
    a, b = part.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(z.dtype)
