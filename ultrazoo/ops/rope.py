"""Rotary position embedding over (T, H, W), real and per axis (Su et al., arXiv 2104.09864; axes as in Wan 2.1).

Each axis owns a range of channels and turns its pairs by ``position * base**(-2i/channels)``. Tables are per axis
(kilobytes); the eager path multiplies by them in chunks of tokens that stay in cache, the traced path with plain
broadcast arithmetic on real pairs (complex numbers do not export).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec import Rope

TABLE_BYTES = 1 << 20
"""Most bytes of a combined table of one chunk of tokens, in the eager path."""


class AxisPositions(Protocol):
    """What `rotate` reads of `attention.contract.Positions`."""

    @property
    def t(self) -> Tensor: ...
    @property
    def h(self) -> Tensor: ...
    @property
    def w(self) -> Tensor: ...
    @property
    def rule(self) -> str: ...
    @property
    def extent(self) -> Sequence[int] | None: ...


def frequencies(
    channels: int, base: float, device: torch.device, rule: str = "none", trained: int = 0, length: int = 0
) -> Tensor:
    """Angles per unit of position, fp64 (channels // 2,).

    `rule` stretches an axis of `length` positions that was trained at `trained`: ``interpolate`` divides every frequency
    by the ratio s, ``ntk`` scales the base by ``s**(c / (c-2))``, ``yarn`` interpolates only the frequencies that turn
    less than once over the trained length, with a ramp up to 32 turns (arXiv 2309.00071, section 3.2).
    """
    exponent = torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels
    if rule == "none" or length <= trained:
        return base**-exponent
    ratio = length / trained
    if rule == "interpolate":
        return base**-exponent / ratio
    if rule == "ntk":
        return (base * ratio ** (channels / (channels - 2))) ** -exponent if channels > 2 else base**-exponent / ratio
    if rule != "yarn":
        raise ValueError(f"unknown rope rule {rule!r}")
    plain = base**-exponent
    turns = trained * plain / (2 * math.pi)
    keep = ((turns - 1) / 31).clamp(0, 1)
    return plain * keep + plain / ratio * (1 - keep)


def axis_angles(positions: Tensor, channels: int, base: float, **stretch: Any) -> Tensor:
    """Angles of one axis: (n,) positions → fp64 (n, channels // 2)."""
    return positions.to(torch.float64)[:, None] * frequencies(channels, base, positions.device, **stretch)


def tables(positions: AxisPositions, rope: Rope) -> list[Tensor]:
    """Angles of the three axes: fp64 (T, a/2), (H, b/2), (W, c/2)."""
    found = []
    for axis, (at, channels) in enumerate(zip((positions.t, positions.h, positions.w), rope.axes, strict=True)):
        stretch: dict[str, Any] = {}
        if positions.rule != "none" and positions.extent is not None and rope.trained is not None:
            stretch = {"rule": positions.rule, "trained": rope.trained[axis], "length": positions.extent[axis]}
        found.append(axis_angles(at, channels, rope.base, **stretch))
    return found


def rotate(z: Tensor, positions: AxisPositions, rope: Rope) -> Tensor:
    """Rotate (B, n, heads, D), n = T*H*W of `positions`; channels past ``sum(rope.axes)`` pass unchanged.

    fp32 inside for fp16 and bf16 inputs; differentiable.
    """
    angles = tables(positions, rope)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _rotate_traced(z, angles, rope)
    return _Rotate.apply(z, rope, *angles)  # type: ignore[no-any-return, no-untyped-call]


def _combined(parts: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """Per-axis values (T, a), (H, b), (W, c) → (T, H, W, a+b+c)."""
    t, h, w = parts
    return torch.cat(
        [
            t[:, None, None].expand(*grid, -1),
            h[None, :, None].expand(*grid, -1),
            w[None, None].expand(*grid, -1),
        ],
        dim=-1,
    )


def _rotate_traced(z: Tensor, angles: list[Tensor], rope: Rope) -> Tensor:
    grid = [a.shape[0] for a in angles]
    wide = z.dtype if z.dtype == torch.float64 else torch.float32
    turn = _combined([a.to(wide) for a in angles], grid).flatten(0, 2)[:, None]
    cos, sin = turn.cos(), turn.sin()
    used = sum(rope.axes)
    rotated = z[..., :used].to(wide)
    if rope.pairing == "interleaved":
        a, b = rotated.unflatten(-1, (used // 2, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    rotated = rotated.to(z.dtype)
    return rotated if used == z.shape[-1] else torch.cat([rotated, z[..., used:]], dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotation whose backward is the rotation by the opposite angles: nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rope: Rope, *angles: Tensor) -> Tensor:
        ctx.rope = rope
        ctx.save_for_backward(*angles)
        return _rotate_chunks(z, list(angles), rope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        opposite = [-a for a in ctx.saved_tensors]
        return _Rotate.apply(grads[0], ctx.rope, *opposite), None, None, None, None  # type: ignore[no-untyped-call]


def _rotate_chunks(z: Tensor, angles: list[Tensor], rope: Rope) -> Tensor:
    grid = tuple(a.shape[0] for a in angles)
    wide = torch.complex128 if z.dtype == torch.float64 else torch.complex64
    units = [torch.polar(torch.ones_like(a), a).to(wide) for a in angles]
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    source, target = (v.unflatten(1, grid) for v in (z, out))
    used = sum(rope.axes)
    row_bytes = grid[2] * (used // 2) * (16 if wide == torch.complex128 else 8)
    limit = TABLE_BYTES if z.device.type == "cpu" else 8 * TABLE_BYTES
    rows = max(1, min(grid[1], limit // row_bytes))
    for y in range(0, grid[1], rows):
        table = _combined(
            [units[0][:1] * 0 + 1, units[1][y : y + rows], units[2]], (1, min(rows, grid[1] - y), grid[2])
        )
        split = rope.axes[0] // 2
        for t in range(grid[0]):
            table[..., :split] = units[0][t]
            _turn(source[:, t : t + 1, y : y + rows], target[:, t : t + 1, y : y + rows], table[..., None, :], rope)
    if used < z.shape[-1]:
        out[..., used:] = z[..., used:]
    return out


def _turn(z: Tensor, out: Tensor, table: Tensor, rope: Rope) -> None:
    """Write z turned by the complex `table` (…, used // 2) into `out`."""
    used = sum(rope.axes)
    real = table.real.dtype
    z, out = z[..., :used], out[..., :used]
    if rope.pairing == "halves":
        turned = torch.complex(*z.to(real).chunk(2, dim=-1)) * table
        out.copy_(torch.cat([turned.real, turned.imag], dim=-1))
        return
    pairs = (used // 2, 2)
    if z.dtype == real and z.stride(-1) == 1:
        source = torch.view_as_complex(z.unflatten(-1, pairs))
        torch.mul(source, table, out=torch.view_as_complex(out.unflatten(-1, pairs)))
        return
    turned = torch.view_as_complex(z.to(real).contiguous().unflatten(-1, pairs)) * table
    out.copy_(torch.view_as_real(turned).flatten(-2))
