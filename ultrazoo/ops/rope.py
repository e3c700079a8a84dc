"""Rotary position embedding over (T, H, W), real and per axis (Su et al., arXiv 2104.09864; axes as in Wan 2.1).

Each axis owns a range of channels and turns its pairs by ``position * base**(-2i/channels)``. Tables are per axis
(kilobytes); the eager path multiplies by them in chunks of tokens that stay in cache, the traced path with plain
broadcast arithmetic on real pairs (complex numbers do not export).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec import Rope
from .graphs import followed, of_sizes

TABLE_BYTES = 1 << 17
"""Most bytes of a combined table of one chunk of tokens, in the eager path on a CPU (32 times that elsewhere)."""


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


def stretch(length: int | Tensor, trained: int, device: torch.device) -> Tensor:
    """How many times longer than trained an axis is, at least 1: fp64 scalar. `length` may be symbolic, or a tensor."""
    if isinstance(length, Tensor):
        return (length.to(device, torch.float64) / trained).clamp(min=1.0)
    return (torch.scalar_tensor(length, dtype=torch.float64, device=device) / trained).clamp(min=1.0)


def frequencies(
    channels: int, base: float, device: torch.device, rule: str = "none", ratio: Tensor | None = None
) -> Tensor:
    """Angles per unit of position, fp64 (channels // 2,).

    `rule` stretches an axis that is `ratio` times longer than trained: ``interpolate`` divides every frequency by the
    ratio s, ``ntk`` scales the base by ``s**(c / (c-2))`` (a single frequency is divided).
    """
    exponent = torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels
    plain = base**-exponent
    if rule == "none" or ratio is None:
        return plain
    if rule == "interpolate" or (rule == "ntk" and channels == 2):
        return plain / ratio
    if rule == "ntk":
        return plain * ratio ** (-exponent * channels / (channels - 2))
    raise ValueError(f"unknown rope rule {rule!r}")


def yarn_frequencies(channels: int, base: float, trained: int, ratio: Tensor) -> Tensor:
    """Frequencies that turn less than once over the trained length are divided by `ratio`, those above 32 turns kept,
    with a ramp between (arXiv 2309.00071, section 3.2): fp64 (channels // 2,)."""
    plain = frequencies(channels, base, ratio.device)
    keep = ((trained * plain / (2 * math.pi) - 1) / 31).clamp(0, 1)
    return plain * keep + plain / ratio * (1 - keep)


class AxisTable(NamedTuple):
    """Angles of one axis, fp64 (n, channels // 2), and the factor on their cosines and sines; None is 1."""

    angles: Tensor
    magnitude: Tensor | None = None


@of_sizes
def axis_table(
    positions: Tensor, channels: int, base: float, rule: str = "none", trained: int = 0, length: int = 0
) -> AxisTable:
    """One axis of `length` positions that was trained at `trained`: (n,) positions → its table.

    ``yarn`` also multiplies cosines and sines by ``0.1 ln s + 1`` (section 3.4).
    """
    at, device = positions.to(torch.float64)[:, None], positions.device
    if rule == "none":
        return AxisTable(at * frequencies(channels, base, device))
    ratio = stretch(length, trained, device)
    if rule == "yarn":
        return AxisTable(at * yarn_frequencies(channels, base, trained, ratio), 0.1 * ratio.log() + 1)
    return AxisTable(at * frequencies(channels, base, device, rule, ratio))


def axis_angles(positions: Tensor, channels: int, base: float, **rule: Any) -> Tensor:
    """Angles of one axis: (n,) positions → fp64 (n, channels // 2)."""
    return axis_table(positions, channels, base, **rule).angles


def tables(positions: AxisPositions, rope: Rope) -> list[AxisTable]:
    """Tables of the three axes: (T, a/2), (H, b/2), (W, c/2)."""
    found = []
    for axis, (at, channels) in enumerate(zip((positions.t, positions.h, positions.w), rope.axes, strict=True)):
        rule: dict[str, Any] = {}
        if positions.rule != "none" and positions.extent is not None and rope.trained is not None:
            rule = {"rule": positions.rule, "trained": rope.trained[axis], "length": positions.extent[axis]}
        found.append(axis_table(at, channels, rope.base, **rule))
    return found


def rotate(z: Tensor, positions: AxisPositions, rope: Rope) -> Tensor:
    """Rotate (B, n, heads, D), n = T*H*W of `positions`; channels past ``sum(rope.axes)`` pass unchanged.

    fp32 inside for fp16 and bf16 inputs; differentiable.
    """
    axes = tables(positions, rope)
    if followed():
        return _rotate_traced(z, axes, rope)
    magnitudes = tuple(axis.magnitude for axis in axes)
    return _Rotate.apply(z, rope, magnitudes, *(axis.angles for axis in axes))  # type: ignore[no-any-return, no-untyped-call]


def normed_rotated(
    z: Tensor, norm: Callable[[Tensor], Tensor] | None, head_dim: int, positions: AxisPositions, rope: Rope
) -> Tensor:
    """Norm, split into heads and rotate raw projections: (B, n, width) → (B, n, heads, D).

    `norm` acts on each token alone. Without gradients on a CPU all three happen chunk by chunk, in cache.
    """
    chunked = z.device.type == "cpu" and not (torch.is_grad_enabled() and z.requires_grad)
    if not chunked or norm is None or followed():
        z = z if norm is None else norm(z)
        return rotate(z.unflatten(-1, (-1, head_dim)), positions, rope)

    def prepared(chunk: Tensor) -> Tensor:
        return norm(chunk).unflatten(-1, (-1, head_dim))

    out = torch.empty(*z.shape[:2], z.shape[2] // head_dim, head_dim, dtype=z.dtype, device=z.device)
    with torch.no_grad():
        return _rotate_chunks(z, tables(positions, rope), rope, out, prepared)


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


def _rotate_traced(z: Tensor, axes: list[AxisTable], rope: Rope) -> Tensor:
    wide = z.dtype if z.dtype == torch.float64 else torch.float32
    cos, sin = _cos_sin(axes, wide)
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


@of_sizes
def _cos_sin(axes: list[AxisTable], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token, (N, 1, channels // 2) each."""
    turn = _combined([axis.angles.to(dtype) for axis in axes], [axis.angles.shape[0] for axis in axes])
    turn = turn.flatten(0, 2)[:, None]
    cos, sin = turn.cos(), turn.sin()
    if all(axis.magnitude is None for axis in axes):
        return cos, sin
    scale = torch.cat([_magnitude(axis.magnitude, axis.angles[0]) for axis in axes]).to(dtype)
    return cos * scale, sin * scale


def _magnitude(factor: Tensor | None, like: Tensor) -> Tensor:
    """One factor per element of `like`."""
    return torch.ones_like(like) if factor is None else torch.ones_like(like) * factor


class _Rotate(torch.autograd.Function):
    """Rotation whose backward is the rotation by the opposite angles, equally scaled: only the tables are kept."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rope: Rope, magnitudes: tuple[Tensor | None, ...], *angles: Tensor) -> Tensor:
        ctx.rope, ctx.magnitudes = rope, magnitudes
        ctx.save_for_backward(*angles)
        axes = [AxisTable(a, m) for a, m in zip(angles, magnitudes, strict=True)]
        return _rotate_chunks(z, axes, rope, torch.empty_like(z, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        opposite = [-a for a in ctx.saved_tensors]
        turned = _Rotate.apply(grads[0], ctx.rope, ctx.magnitudes, *opposite)  # type: ignore[no-untyped-call]
        return turned, None, None, None, None, None


def _rotate_chunks(
    z: Tensor, axes: list[AxisTable], rope: Rope, out: Tensor, prepared: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Write z (B, n, …), chunk by chunk through `prepared` where given, rotated into `out` (B, n, heads, D)."""
    grid = tuple(axis.angles.shape[0] for axis in axes)
    wide = torch.complex128 if z.dtype == torch.float64 else torch.complex64
    units = [torch.polar(_magnitude(axis.magnitude, axis.angles), axis.angles).to(wide) for axis in axes]
    source, target = (v.unflatten(1, grid) for v in (z, out))
    used = sum(rope.axes)
    row_bytes = grid[2] * (used // 2) * (16 if wide == torch.complex128 else 8)
    limit = TABLE_BYTES if z.device.type == "cpu" else 32 * TABLE_BYTES
    rows = max(1, min(grid[1], limit // row_bytes))
    for y in range(0, grid[1], rows):
        table = _combined(
            [units[0][:1] * 0 + 1, units[1][y : y + rows], units[2]], (1, min(rows, grid[1] - y), grid[2])
        )
        split = rope.axes[0] // 2
        for t in range(grid[0]):
            table[..., :split] = units[0][t]
            chunk = source[:, t : t + 1, y : y + rows]
            chunk = chunk if prepared is None else prepared(chunk)
            place = target[:, t : t + 1, y : y + rows]
            _turn(chunk, place, table[..., None, :], rope)
            if used < out.shape[-1]:
                place[..., used:] = chunk[..., used:]
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
