"""Cut a token grid into windows and put it together again, in two equal forms.

The **rectangle** form handles each run of equal windows as one dense batch: exact at every size, no mask, no padding; it
needs sizes that are plain ints. The **index** form gathers each axis with two-dimensional index arrays, repeats the last
token where a window is short and says so in a key mask: it exports with symbolic sizes. Tensors are token-major:
(B, T, H, W, heads, D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .graphs import of_sizes
from .runs import AxisCut, Span, in_parts

Cuts = tuple[AxisCut, AxisCut, AxisCut]


Rectangle = tuple[Span, Span, Span]


def rectangles(cuts: Cuts) -> list[Rectangle]:
    """The dense blocks of equal windows that the cuts make, in t, h, w order."""
    return list(itertools.product(*(cut.spans() for cut in cuts)))


def reordered(z: Tensor, cuts: Cuts, inverse: bool = False) -> Tensor:
    """(B, T, H, W, …) with the tokens of strided axes window by window, or back again."""
    for axis, cut in enumerate(cuts):
        order = cut.order()
        if order is not None:
            index = torch.tensor(order, device=z.device)
            z = z.index_select(axis + 1, index.argsort() if inverse else index)
    return z


def rectangle_windows(z: Tensor, rectangle: Rectangle) -> Tensor:
    """One rectangle of reordered tokens (B, T, H, W, heads, D) → (B*groups, heads, tokens, D), batch outermost."""
    t, h, w = rectangle
    # (B, ct, st, ch, sh, cw, sw, heads, D)
    piece = z[:, t.start : t.stop, h.start : h.stop, w.start : w.stop]
    piece = piece.unflatten(3, (w.count, w.size)).unflatten(2, (h.count, h.size)).unflatten(1, (t.count, t.size))
    piece = piece.permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    groups = z.shape[0] * t.count * h.count * w.count
    return piece.reshape(groups, z.shape[4], t.size * h.size * w.size, z.shape[5])


def _as_block(piece: Tensor, rectangle: Rectangle, batch: int) -> Tensor:
    """(B*groups, heads, tokens, D) → a view (B, ct, st, ch, sh, cw, sw, heads, D)."""
    t, h, w = rectangle
    view = piece.unflatten(2, (t.size, h.size, w.size)).unflatten(0, (batch, t.count, h.count, w.count))
    return view.permute(0, 1, 5, 2, 6, 3, 7, 4, 8)


def put_rectangle(whole: Tensor, piece: Tensor, rectangle: Rectangle) -> None:
    """Write the windows of one rectangle to their place in reordered tokens `whole` (B, T, H, W, heads, D)."""
    t, h, w = rectangle
    place = whole[:, t.start : t.stop, h.start : h.stop, w.start : w.stop]
    place = place.unflatten(3, (w.count, w.size)).unflatten(2, (h.count, h.size)).unflatten(1, (t.count, t.size))
    place.copy_(_as_block(piece, rectangle, whole.shape[0]))


def slabs(queries: Cuts, keys: Cuts, tokens: int) -> tuple[Cuts, Cuts]:
    """The same windows in rectangles of at most `tokens` queries, where whole windows allow it: split along H, W, T.

    Run i of `queries` and run i of `keys` must have the same number of windows, and keep it.
    """
    split = list(queries), list(keys)
    widest = [cut.length for cut in queries]
    for axis in (1, 2, 0):
        cut = queries[axis]
        if math.prod(widest) <= tokens:
            break
        others = math.prod(widest) // widest[axis]
        most = max(1, tokens // (others * cut.longest))
        for cuts in split:
            cuts[axis] = in_parts(cuts[axis], most)
        widest[axis] = max(count * size for count, size in split[0][axis].runs)
    (qt, qh, qw), (kt, kh, kw) = split
    return (qt, qh, qw), (kt, kh, kw)


def windows(z: Tensor, cuts: Cuts) -> list[Tensor]:
    """(B, T, H, W, heads, D) → one (B*groups, heads, tokens, D) per rectangle of equal windows, batch outermost."""
    z = reordered(z, cuts)
    return [rectangle_windows(z, rectangle) for rectangle in rectangles(cuts)]


def token_windows(z: Tensor, cuts: Cuts) -> list[Tensor]:
    """The same for per-token values (B, T, H, W): one (B*groups, tokens) per rectangle."""
    return [piece[:, 0, :, 0] for piece in windows(z[..., None, None], cuts)]


def unwindows(pieces: Sequence[Tensor], cuts: Cuts, batch: int) -> Tensor:
    """The inverse of `windows`: pieces back to (B, T, H, W, heads, D), differentiable."""
    blocks = []
    for piece, rectangle in zip(pieces, rectangles(cuts), strict=True):
        blocks.append(_as_block(piece, rectangle, batch).flatten(5, 6).flatten(3, 4).flatten(1, 2))
    # rectangles come in t, h, w order: join along W, then H, then T
    for axis in (3, 2, 1):
        count = len(cuts[axis - 1].runs)
        if count > 1:
            blocks = [torch.cat(blocks[i : i + count], dim=axis) for i in range(0, len(blocks), count)]
    return reordered(blocks[0], cuts, inverse=True)


# --- the index form -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AxisRule:
    """How to cut an axis whose length is not known yet: `kind` and its number, `shift` tokens of the first window.

    ``counts``: n balanced windows; ``size``: windows of n, the first of `shift` tokens when shift > 0; ``strided``: n
    residue classes; ``whole``: one window; ``halves``: the n balanced windows, borders moved to their middles.
    """

    kind: Literal["whole", "counts", "size", "strided", "halves"]
    number: int = 1
    shift: int = 0


class AxisIndex(NamedTuple):
    """Index arrays of one axis: `gather` (windows, slots) tokens, `valid` the same shape, and for each token its
    `window` and `slot`. All None for an axis in one window."""

    gather: Tensor | None = None
    valid: Tensor | None = None
    window: Tensor | None = None
    slot: Tensor | None = None


@of_sizes
def axis_index(rule: AxisRule, length: int, device: torch.device) -> AxisIndex:
    """Index arrays of one axis; `length` may be symbolic. Shapes: gather and valid (windows, slots), rest (length,)."""
    if rule.kind == "whole" or (rule.kind in ("counts", "strided") and rule.number == 1):
        return AxisIndex()
    tokens = torch.arange(length, device=device)
    n = rule.number
    if rule.kind == "strided":
        slots = torch.arange((length + n - 1) // n, device=device)
        at = torch.arange(n, device=device)[:, None] + slots * n
        return AxisIndex(at.clamp(max=length - 1), at < length, tokens % n, tokens // n)
    if rule.kind == "size":
        before = (n - rule.shift) % n
        count = (length + before + n - 1) // n
        at = torch.arange(count, device=device)[:, None] * n + torch.arange(n, device=device) - before
        return AxisIndex(
            at.clamp(0, length - 1), (at >= 0) & (at < length), (tokens + before) // n, (tokens + before) % n
        )
    size, longer = length // n, length % n
    index = torch.arange(n, device=device)
    start = index * size + index.clamp(max=longer)
    sizes = size + (index < longer)
    split = longer * (size + 1)
    window = torch.where(tokens < split, tokens // (size + 1), longer + (tokens - split) // size)
    slots = torch.arange((length + n - 1) // n, device=device)
    if rule.kind == "counts":
        at = start[:, None] + slots
        valid = slots < sizes[:, None]
        return AxisIndex(torch.minimum(at, (start + sizes - 1)[:, None]), valid, window, tokens - start[window])
    # halves: borders at the middles; window j runs from middle j-1 to middle j, the ends from 0 and to the end
    middle = start + sizes // 2
    first = torch.cat([torch.zeros_like(middle[:1]), middle])
    last = torch.cat([middle, torch.zeros_like(middle[:1]) + length])
    slots = torch.arange((length + n - 1) // n + 1, device=device)
    at = first[:, None] + slots
    window = window + (tokens >= middle[window])
    gather = torch.minimum(at, (last - 1).clamp(min=0)[:, None])
    return AxisIndex(gather, at < last[:, None], window, tokens - first[window])


Indices = tuple[AxisIndex, AxisIndex, AxisIndex]


def indices(rules: Sequence[AxisRule], grid: Sequence[int], device: torch.device) -> Indices:
    """Index arrays of the three axes."""
    t, h, w = (axis_index(rule, length, device) for rule, length in zip(rules, grid, strict=True))
    return (t, h, w)


@of_sizes
def tokens_of_slots(axes: Indices, grid: Sequence[int], device: torch.device) -> Tensor:
    """The token that each slot of each window holds: (windows, slots), windows and slots in t, h, w order.

    One index for all three axes: rows of heads*D are copied once, and a compiled graph computes it once, not per row.
    """
    t, h, w = (
        torch.arange(length, device=device)[None] if index.gather is None else index.gather
        for index, length in zip(axes, grid, strict=True)
    )
    # (Kt, 1, 1, St, 1, 1), (Kh, 1, 1, Sh, 1), (Kw, 1, 1, Sw)
    at = (t[:, None, None, :, None, None] * grid[1] + h[:, None, None, :, None]) * grid[2] + w[:, None, None, :]
    return _flat(at, axes)


@of_sizes
def slots_of_tokens(axes: Indices, grid: Sequence[int], device: torch.device) -> Tensor:
    """For each token its place among all windows' slots, as `tokens_of_slots` orders them: (N,)."""
    windows, slots = [], []
    for axis, (index, length) in enumerate(zip(axes, grid, strict=True)):
        shape = [1, 1, 1]
        shape[axis] = -1
        if index.gather is None:
            windows.append((1, torch.zeros((), dtype=torch.long, device=device)))
            slots.append((length, torch.arange(length, device=device).view(shape)))
        else:
            assert index.window is not None and index.slot is not None
            windows.append((index.gather.shape[0], index.window.view(shape)))
            slots.append((index.gather.shape[1], index.slot.view(shape)))
    at = windows[0][1]
    for count, index in (*windows[1:], *slots):
        at = at * count + index
    return at.flatten()


def _flat(at: Tensor, axes: Indices) -> Tensor:
    """(Kt, Kh, Kw, St, Sh, Sw) → (windows, slots)."""
    at = at.flatten(3, 5)
    # a dimension of 1 beside a symbolic one makes an exporter ask whether that is 1 too
    for axis in (2, 1, 0):
        if axes[axis].gather is None:
            at = at.squeeze(axis)
    return at.flatten(0, -2) if at.dim() > 1 else at.unsqueeze(0)


def gathered_heads(z: Tensor, axes: Indices) -> Tensor:
    """(B, T, H, W, heads, D) → (B*windows, heads, slots, D), batch outermost."""
    if all(index.gather is None for index in axes):
        # dimensions of one window each, as the gathered form has them: of keys that are a strided view an exporter asks less
        whole = z.unsqueeze(1).unsqueeze(3).unsqueeze(5).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
        return whole.flatten(5, 7).flatten(0, 3)
    at = tokens_of_slots(axes, z.shape[1:4], z.device)
    # (B, windows, slots, heads, D)
    return z.flatten(1, 3)[:, at].transpose(2, 3).flatten(0, 1)


@of_sizes
def gathered_mask(axes: Indices, grid: Sequence[int], batch: int, device: torch.device) -> Tensor | None:
    """Which gathered slots are real: (B*windows, slots), None where every one is."""
    if all(index.valid is None for index in axes):
        return None
    parts = []
    for index, length in zip(axes, grid, strict=True):
        valid = index.valid
        parts.append(torch.ones(1, length, dtype=torch.bool, device=device) if valid is None else valid)
    t, h, w = parts
    mask = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    mask = _flat(mask, axes)
    return mask.unsqueeze(0).expand(batch, -1, -1).flatten(0, 1)


def scattered(y: Tensor, axes: Indices, grid: Sequence[int], batch: int) -> Tensor:
    """The inverse of `gathered_heads`: (B*windows, heads, slots, D) → (B, T, H, W, heads, D)."""
    y = y.transpose(1, 2)
    if any(index.gather is not None for index in axes):
        windows = math.prod(1 if index.gather is None else index.gather.shape[0] for index in axes)
        # (B, windows*slots, heads, D)
        y = y.unflatten(0, (batch, windows)).flatten(1, 2).index_select(1, slots_of_tokens(axes, grid, y.device))
    return y.unflatten(1, tuple(grid))
