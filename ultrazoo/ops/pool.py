"""Many tokens to one and back: cells, lifts and the resizes of the released UltraGen. Token-major (B, T, H, W, C).

A cell is (ft, fh, fw) tokens. At sizes that do not divide, **exact** fills the last cell by repeating the edge tokens and
**resize** drops the remainder. Each operation has an eager form and one that exports with symbolic sizes
(`traced=True`); tests hold them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .graphs import followed, of_sizes

Cell = tuple[int, int, int]
Ragged = Literal["exact", "resize"]
Mode = Literal["nearest", "bilinear"]


def coarse_size(length: int, factor: int, ragged: Ragged = "exact") -> int:
    """Cells along an axis: rounded up when exact, the remainder dropped when resizing."""
    return (length + factor - 1) // factor if ragged == "exact" else length // factor


def cells(x: Tensor, cell: Cell, ragged: Ragged = "exact", traced: bool = False) -> Tensor:
    """(B, T, H, W, C) → (B, t, ft, h, fh, w, fw, C)."""
    for axis, factor in enumerate(cell):
        dim = 1 + 2 * axis
        length = x.shape[dim]
        count = coarse_size(length, factor, ragged)
        if factor == 1:
            x = x.unsqueeze(dim + 1)
        elif not traced and count * factor == length:
            x = x.unflatten(dim, (count, factor))
        else:
            at = torch.arange(count, device=x.device)[:, None] * factor + torch.arange(factor, device=x.device)
            at = at.clamp(max=length - 1)
            x = x[(slice(None),) * dim + (at,)]
    return x


def mean_cells(x: Tensor, cell: Cell, ragged: Ragged = "exact", traced: bool = False) -> Tensor:
    """The mean of each cell: (B, T, H, W, C) → (B, t, h, w, C)."""
    return cells(x, cell, ragged, traced).mean(dim=(2, 4, 6))


def true_means(x: Tensor, cell: Cell, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of the tokens that each cell has, a partial cell fewer, and how many: (B, T, H, W, C) → (B, t, h, w, C), sums in
    fp32 or wider, and (B | 1, t, h, w). `valid` (B, T, H, W) is False for tokens that do not count; a cell of none is zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    real = torch.ones(1, *x.shape[1:4], dtype=torch.bool, device=x.device) if valid is None else valid
    if valid is not None:
        x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
    counts = _cell_sums(real.unsqueeze(-1), cell, wide)
    means = _cell_sums(x, cell, wide) / counts.clamp(min=1)
    return means.to(x.dtype), counts.squeeze(-1)


def _cell_sums(x: Tensor, cell: Cell, dtype: torch.dtype) -> Tensor:
    """(B, T, H, W, C) → (B, t, h, w, C); what lies beyond the grid counts as zero."""
    over = [-length % factor for length, factor in zip(x.shape[1:4], cell, strict=True)]
    if any(over):
        x = F.pad(x, (0, 0, 0, over[2], 0, over[1], 0, over[0]))
    x = x.unflatten(3, (-1, cell[2])).unflatten(2, (-1, cell[1])).unflatten(1, (-1, cell[0]))
    return x.sum(dim=(2, 4, 6), dtype=dtype)


def first_of_cells(x: Tensor, cell: Cell, ragged: Ragged = "exact", traced: bool = False) -> Tensor:
    """The first token of each cell: (B, T, H, W, C) → (B, t, h, w, C)."""
    if traced:
        return cells(x, cell, ragged, traced)[:, :, 0, :, 0, :, 0]
    t, h, w = (coarse_size(x.shape[1 + axis], cell[axis], ragged) for axis in range(3))
    return x[:, :: cell[0], :: cell[1], :: cell[2]][:, :t, :h, :w]


def conv_cells(
    x: Tensor, weight: Tensor, bias: Tensor, cell: Cell, ragged: Ragged = "exact", traced: bool = False
) -> Tensor:
    """Depthwise convolution with kernel = stride = cell: weight (C, 1, [ft,] fh, fw), bias (C,)."""
    taps = weight.reshape(weight.shape[0], *cell)
    if not traced and cell[0] == 1 and x.device.type == "cpu":
        return _conv_cells_2d(x, weight, bias, cell, ragged)
    # (B, t, ft, h, fh, w, fw, C) * (ft, 1, fh, 1, fw, C)
    if traced:
        return _conv_gathered(x, taps, bias, cell, ragged)
    spread = taps.permute(1, 2, 3, 0)[:, None, :, None]
    return (cells(x, cell, ragged, traced) * spread).sum(dim=(2, 4, 6)) + bias


def _conv_gathered(x: Tensor, taps: Tensor, bias: Tensor, cell: Cell, ragged: Ragged) -> Tensor:
    """The same by one gather of tokens: (B, cells, tokens of a cell, C), weighed and summed; sizes may be symbolic."""
    grid = x.shape[1:4]
    at = _tokens_of_cells(tuple(grid), cell, ragged, x.device)
    # fp32 inside for 16 bits, as a convolution adds
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = taps.flatten(1).transpose(0, 1).to(wide)
    sums = (x.flatten(1, 3)[:, at].to(wide) * weights).sum(dim=2) + bias.to(wide)
    sizes = tuple(coarse_size(length, factor, ragged) for length, factor in zip(grid, cell, strict=True))
    return sums.to(x.dtype).unflatten(1, sizes)


@of_sizes
def _tokens_of_cells(grid: Sequence[int], cell: Cell, ragged: Ragged, device: torch.device) -> Tensor:
    """The tokens of every cell, edge tokens repeated: (cells, tokens of a cell)."""
    at: Tensor | None = None
    for length, factor in zip(grid, cell, strict=True):
        count = coarse_size(length, factor, ragged)
        index = torch.arange(count, device=device)[:, None] * factor + torch.arange(factor, device=device)
        index = index.clamp(max=length - 1)
        # (n, f) after (cells so far, tokens so far) → (cells, tokens)
        at = index if at is None else (at[:, None, :, None] * length + index[:, None]).flatten(2, 3).flatten(0, 1)
    assert at is not None
    return at


def _conv_cells_2d(x: Tensor, weight: Tensor, bias: Tensor, cell: Cell, ragged: Ragged) -> Tensor:
    batch, frames = x.shape[:2]
    kernel = cell[1:]
    image = x.flatten(0, 1).permute(0, 3, 1, 2)
    if ragged == "exact":
        over = [coarse_size(x.shape[2 + axis], kernel[axis]) * kernel[axis] - x.shape[2 + axis] for axis in range(2)]
        if any(over):
            image = F.pad(image, (0, over[1], 0, over[0]), mode="replicate")
    image = image.contiguous(memory_format=torch.channels_last)
    taps = weight.reshape(weight.shape[0], 1, *kernel)
    small = F.conv2d(image, taps, bias, stride=kernel, groups=weight.shape[0])
    return small.permute(0, 2, 3, 1).unflatten(0, (batch, frames))


def lift(
    x: Tensor,
    cell: Cell,
    size: Sequence[int],
    mode: Mode,
    ragged: Ragged = "exact",
    traced: bool = False,
) -> Tensor:
    """Cells back to tokens: (B, t, h, w, C) → (B, *size, C).

    Exact: to the full multiple of the cell, then cropped; resize: straight to `size`. Bilinear is linear along time too
    where cells span frames; positions as in ``align_corners=False``.
    """
    if ragged == "exact" and traced:
        # rounded once, as an interpolation is
        found = x if mode == "nearest" else x.to(torch.promote_types(x.dtype, torch.float32))
        for axis, factor in enumerate(cell):
            if factor > 1:
                found = _lift_axis(found, axis + 1, factor, size[axis], mode)
        return found.to(x.dtype)
    if _lifts_by_phase(x, mode, ragged):
        return _lift_by_phase(x, cell, x.new_empty(x.shape[0], *size, x.shape[-1]))
    goal = tuple(size)
    if ragged == "exact":
        goal = tuple(x.shape[1 + axis] * cell[axis] for axis in range(3))
    x = resize(x, goal, mode)
    return x[:, : size[0], : size[1], : size[2]]


def _lifts_by_phase(x: Tensor, mode: str, ragged: Ragged) -> bool:
    """Is `_lift_by_phase` the way? A CPU is slow at torch's interpolation of single frames with channels last."""
    wide = x.dtype == torch.promote_types(x.dtype, torch.float32)
    eager = not torch.is_grad_enabled() and not followed()
    return mode == "bilinear" and ragged == "exact" and wide and eager and x.device.type == "cpu"


def _lift_by_phase(x: Tensor, cell: Cell, out: Tensor) -> Tensor:
    """Bilinear, to the first tokens that `out` (B, T, H, W, C) has room for: axis by axis, the last one first."""
    axes = [axis for axis in (3, 2, 1) if cell[axis - 1] > 1]
    for axis in axes:
        shape = (*x.shape[:axis], out.shape[axis], *x.shape[axis + 1 :])
        into = out if axis == axes[-1] else x.new_empty(shape)
        for phase in range(min(cell[axis - 1], out.shape[axis])):
            _lift_phase(x.movedim(axis, 0), phase, cell[axis - 1], into.movedim(axis, 0))
        x = into
    return x if axes else out.copy_(x)


def _lift_phase(x: Tensor, phase: int, factor: int, out: Tensor) -> None:
    """Tokens `phase`, `phase` + `factor`, ... of `out` (n, ...) from cells `x`: all lie between two cells in the same way."""
    place = out[phase::factor]
    part = (phase + 0.5) / factor - 0.5
    if part < 0:
        # between the cell before and their own; before the first cell there is none
        place[0] = x[0]
        place[1:] = torch.lerp(x[: len(place) - 1], x[1 : len(place)], 1 + part)
        return
    inner = min(len(place), len(x) - 1)
    place[:inner] = torch.lerp(x[:inner], x[1 : inner + 1], part)
    if inner < len(place):
        place[-1] = x[-1]


def _lift_axis(x: Tensor, dim: int, factor: int, length: int, mode: str) -> Tensor:
    """One axis by two gathers and a lerp; `length` may be symbolic."""
    if mode == "nearest":
        return x.index_select(dim, torch.arange(length, device=x.device) // factor)
    low, high, part = _beside(length, x.shape[dim], factor, x.device)
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), part.to(x.dtype).reshape(shape))


@of_sizes
def _beside(length: int, count: int, factor: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `length` tokens the two of `count` cells it lies between, and the share of the second."""
    at = ((torch.arange(length, device=device) + 0.5) / factor - 0.5).clamp(min=0)
    low = at.floor()
    part = at - low
    low = low.to(torch.long).clamp(max=count - 1)
    return low, (low + 1).clamp(max=count - 1), part


def resize(x: Tensor, size: Sequence[int], mode: Mode = "bilinear") -> Tensor:
    """(B, T, H, W, C) → (B, *size, C) by interpolation without antialiasing, ``align_corners=False``."""
    size = tuple(size)
    if tuple(x.shape[1:4]) == size:
        return x
    batch, frames = x.shape[:2]
    if size[0] == frames:
        image = x.flatten(0, 1).permute(0, 3, 1, 2)
        image = _interpolate(image, size[1:], mode)
        return image.permute(0, 2, 3, 1).unflatten(0, (batch, frames))
    volume = _interpolate(x.permute(0, 4, 1, 2, 3), size, "trilinear" if mode == "bilinear" else mode)
    return volume.permute(0, 2, 3, 4, 1)


def _interpolate(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    corners = None if mode == "nearest" else False
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=corners)


def nearest_multiple(length: int, count: int) -> int:
    """The multiple of `count` nearest to `length`, at least one of it; ties go down."""
    below = length // count * count
    above = below + count
    near = below if length - below <= above - length else above
    return max(near, count)


def depthwise_conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3x3x3 convolution, zero padding 1: (B, T, H, W, C) with weight (C, 1, 3, 3, 3), bias (C,)."""
    if torch.is_grad_enabled() or followed():
        return _conv3d(x, weight, bias, 1)
    if x.device.type == "cpu":
        # autocast would narrow it
        return _conv3d(x, weight, bias, 1).to(x.dtype)
    frames = _frame_by_frame(x.shape, lambda b, t: x[b, t : t + 1], weight, bias)
    return _together(frames, x.shape, x)


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor, frames_beyond: int) -> Tensor:
    """Channels last in memory: a CPU is four times as slow at channels first."""
    padding = (frames_beyond, 1, 1)
    volume = x.contiguous().permute(0, 4, 1, 2, 3)
    return F.conv3d(volume, weight, bias, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 4, 1)


Frames = Iterator[tuple[int, int, Tensor]]
"""Sample, frame, and its tokens (H, W, C)."""


def _together(frames: Frames, shape: Sequence[int], like: Tensor) -> Tensor:
    out = like.new_empty(tuple(shape))
    for b, t, frame in frames:
        out[b, t] = frame
    return out


def _frame_by_frame(shape: Sequence[int], frame: Callable[[int, int], Tensor], weight: Tensor, bias: Tensor) -> Frames:
    """The convolution of (B, T, H, W, C) frames that `frame` makes on demand, (1, H, W, C) each and at most three kept, as sums
    of two-dimensional convolutions."""
    batch, frames = shape[:2]
    taps = [weight[:, :, i].contiguous(memory_format=torch.channels_last) for i in range(3)]
    for b in range(batch):
        before, here = None, frame(b, 0)
        for t in range(frames):
            after = frame(b, t + 1) if t + 1 < frames else None
            parts = [
                F.conv2d(one.permute(0, 3, 1, 2), tap, bias if i == 1 else None, padding=1, groups=tap.shape[0])
                for i, (one, tap) in enumerate(zip((before, here, after), taps, strict=True))
                if one is not None
            ]
            yield b, t, sum(parts[1:], parts[0])[0].permute(1, 2, 0)
            before, here = here, after


def lift_conv3d(
    x: Tensor,
    cell: Cell,
    size: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    ragged: Ragged = "exact",
    traced: bool = False,
) -> Tensor:
    """Bilinear `lift`, then `depthwise_conv3d`: (B, t, h, w, C) → (B, *size, C).

    Without gradients, where cells lie in one frame, each frame is lifted when the convolution wants it.
    """
    if traced or not in_frames(x, cell, size) or torch.is_grad_enabled() or followed():
        return depthwise_conv3d(lift(x, cell, size, "bilinear", ragged, traced), weight, bias)
    shape = (x.shape[0], *size, x.shape[-1])
    return _together(lift_conv3d_frames(x, cell, size, weight, bias, ragged), shape, x)


def in_frames(x: Tensor, cell: Cell, size: Sequence[int]) -> bool:
    """Is each frame of `size` lifted from one frame of x alone?"""
    return cell[0] == 1 and x.shape[1] == size[0]


def lift_frames(x: Tensor, cell: Cell, size: Sequence[int], mode: Mode, ragged: Ragged = "exact") -> Frames:
    """`lift` of cells in one frame each, frame by frame."""
    for b in range(x.shape[0]):
        for t in range(size[0]):
            yield b, t, lift(x[b : b + 1, t : t + 1], cell, (1, *size[1:]), mode, ragged)[0, 0]


def lift_conv3d_frames(
    x: Tensor, cell: Cell, size: Sequence[int], weight: Tensor, bias: Tensor, ragged: Ragged = "exact"
) -> Frames:
    """`lift_conv3d` of cells in one frame each, frame by frame; without gradients."""

    def frame(b: int, t: int, into: Tensor | None = None) -> Tensor:
        """(1, H, W, C); written to `into` where it is given."""
        coarse = x[b : b + 1, t : t + 1]
        if into is not None and _lifts_by_phase(x, "bilinear", ragged):
            return _lift_by_phase(coarse, cell, into[None])[:, 0]
        found = lift(coarse, cell, (1, *size[1:]), "bilinear", ragged)[:, 0]
        return found if into is None else into.copy_(found)

    shape = (x.shape[0], *size, x.shape[-1])
    if x.device.type != "cpu":
        return _frame_by_frame(shape, frame, weight, bias)
    return _in_threes(shape, frame, weight, bias, x.new_empty(3, *shape[2:]))


def _in_threes(
    shape: Sequence[int], frame: Callable[..., Tensor], weight: Tensor, bias: Tensor, slots: Tensor
) -> Frames:
    """The same from three frames that stay in a CPU's cache: frame t stands in slot t % 3, and the taps turn with it."""
    batch, frames = shape[:2]
    if frames == 1:
        yield from ((b, 0, _conv3d(frame(b, 0)[None], weight, bias, 1)[0, 0]) for b in range(batch))
        return
    taps = [weight.roll(shift, 2) for shift in range(3)]
    for b in range(batch):
        frame(b, 0, slots[:1])
        slots[2] = 0
        for t in range(frames):
            after = slice((t + 1) % 3, (t + 1) % 3 + 1)
            if t + 1 < frames:
                frame(b, t + 1, slots[after])
            else:
                slots[after] = 0
            yield b, t, _conv3d(slots[None], taps[(t - 1) % 3], bias, 0)[0, 0]
