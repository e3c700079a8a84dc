"""Softmax attention over `ops.boxes`: tiles of queries, each with the keys of its box, gathered some tiles at a time.

Queries are (B, N, heads, D) on the boxes' grid. Keys are (B, M, heads, D): those of the grid first, then those of a coarser
grid where the boxes have one, then keys that every query sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import attend
from ..ops.boxes import Boxes, TileClass, batches
from ..ops.graphs import followed
from ..ops.scratch import Scratch
from .grouped import SLAB_BYTES, SLAB_BYTES_ELSEWHERE

Classes = tuple[TileClass, TileClass, TileClass]

NUMBERED = 16
"""Slabs whose rows are numbered at a time: a number takes little beside the row it stands for."""


@dataclass(frozen=True)
class Job:
    """What to attend to. `always`: how many of the last keys every query sees. `valid` (B, M) is False for keys that do not
    count, `log_weight` (B, M) is added to the scores of a key, `scale` None means D**-0.5."""

    boxes: Boxes
    always: int = 0
    valid: Tensor | None = None
    log_weight: Tensor | None = None
    scale: float | None = None
    kernel: str = "auto"


class Slab(NamedTuple):
    """Some tiles of one class: rows of all queries (tiles, Lq) and of all keys (tiles, Lk), batch after batch, and what
    their mask adds to the scores, (1, 1, Lq, Lk)."""

    queries: Tensor
    keys: Tensor
    bias: Tensor | None


def attend_boxes(q: Tensor, k: Tensor, v: Tensor, job: Job) -> Tensor:
    """(B, N, heads, D) queries over (B, M, heads, D) keys and values → (B, N, heads, D).

    Without gradients memory beyond the output is a few slabs. With gradients so too: the backward gathers and attends again.
    """
    if _one_tile(job.boxes):
        slab = Slab(q.new_empty(0), q.new_empty(0), _bias(_only(job.boxes), job, q))
        y = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), slab, job.valid, job.log_weight, job)
        return y.transpose(1, 2)
    if followed():
        return _assembled(q, k, v, job)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Boxed.apply(q, k, v, job)  # type: ignore[no-any-return, no-untyped-call]
    return _filled(q, k, v, job)


def _only(boxes: Boxes) -> Classes:
    t, h, w = boxes.axes
    return t[0], h[0], w[0]


def _one_tile(boxes: Boxes) -> bool:
    """Is everything one tile in its own order, so that nothing need be gathered?"""
    coarse = boxes.coarse or (0, 0, 0)
    for axis, length, cells in zip(boxes.axes, boxes.grid, coarse, strict=True):
        everything = tuple(range(length))
        if len(axis) > 1 or axis[0].queries != (everything,) or axis[0].keys != (everything,):
            return False
        if cells and axis[0].cells != (tuple(range(cells)),):
            return False
    return True


# --- slabs ----------------------------------------------------------------------------------------------------------


def _slabs(q: Tensor, k: Tensor, job: Job, limit: int) -> Iterator[Slab]:
    """Every tile once, in slabs of about `limit` bytes."""
    boxes, device = job.boxes, q.device
    batch, tokens, total = q.shape[0], q.shape[1], k.shape[1]
    row_bytes = q.shape[2] * q.shape[3] * q.element_size()
    last = torch.arange(total - job.always, total, device=device)
    for classes in batches(boxes):
        counts = [len(c.queries) for c in classes]
        queries = [torch.tensor(c.queries, device=device) for c in classes]
        keys = [torch.tensor(c.keys, device=device) for c in classes]
        cells = [torch.tensor(c.cells, device=device) for c in classes] if boxes.coarse else []
        many_q = math.prod([z.shape[1] for z in queries])
        many_k = (
            math.prod([z.shape[1] for z in keys]) + job.always + math.prod([z.shape[1] for z in cells]) * bool(cells)
        )
        bias = _bias(classes, job, q)
        # a mask that differs from tile to tile is laid out for every tile
        laid_out = many_q * many_k * q.element_size() if bias is not None and job.valid is not None else 0
        step = max(1, limit // (2 * (many_q + many_k) * row_bytes + laid_out))
        tiles = batch * math.prod(counts)
        for start in range(0, tiles, step * NUMBERED):
            at = torch.arange(start, min(start + step * NUMBERED, tiles), device=device)
            w, rest = at % counts[2], at // counts[2]
            h, rest = rest % counts[1], rest // counts[1]
            t, b = rest % counts[0], rest // counts[0]
            parts = [_tokens(keys, (t, h, w), boxes.grid)]
            if boxes.coarse is not None:
                parts.append(_tokens(cells, (t, h, w), boxes.coarse) + tokens)
            if job.always:
                parts.append(last.expand(at.shape[0], -1))
            rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            rows = rows + b[:, None] * total
            mine = _tokens(queries, (t, h, w), boxes.grid) + b[:, None] * tokens
            yield from (Slab(*some, bias) for some in zip(mine.split(step), rows.split(step), strict=True))


def _tokens(axes: list[Tensor], tiles: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int]) -> Tensor:
    """Grid tokens (tiles, a*b*c) of the boxes that per-axis tokens (tiles of the axis, size) span."""
    t, h, w = (axis[at] for axis, at in zip(axes, tiles, strict=True))
    plane = t[:, :, None] * grid[1] + h[:, None, :]
    return (plane[..., None] * grid[2] + w[:, None, None, :]).flatten(1)


def _bias(classes: Classes, job: Job, like: Tensor) -> Tensor | None:
    """(1, 1, Lq, Lk): minus infinity where a query of the tile does not see a key; None where every one sees all."""
    if all(c.seen is None for c in classes):
        return None
    t, h, w = (_seen(c, like.device) for c in classes)
    seen = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    seen = seen.flatten(3).flatten(0, 2)
    more = job.always
    if job.boxes.coarse is not None:
        more += math.prod([len(c.cells[0]) for c in classes])
    bias = like.new_zeros(seen.shape[0], seen.shape[1] + more)
    bias[:, : seen.shape[1]].masked_fill_(~seen, float("-inf"))
    return bias[None, None]


def _seen(tile: TileClass, device: torch.device) -> Tensor:
    """(size, count) bool of one axis."""
    size, count = len(tile.queries[0]), len(tile.keys[0])
    if tile.seen is None:
        return torch.ones(size, count, dtype=torch.bool, device=device)
    ranges = torch.tensor(tile.seen, device=device)
    at = torch.arange(count, device=device)
    return (at >= ranges[:, :1]) & (at < ranges[:, 1:])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, slab: Slab, valid: Tensor | None, log_weight: Tensor | None, job: Job
) -> Tensor:
    """(tiles, heads, Lq, D) over (tiles, heads, Lk, D); `valid` and `log_weight` are (tiles, Lk)."""
    out = attend(
        q,
        k,
        v,
        key_mask=None if valid is None else valid[:, None, None],
        bias=slab.bias,
        log_weight=None if log_weight is None else log_weight[:, None, None].to(q.dtype),
        scale=job.scale,
        kernel=job.kernel,
    )
    assert isinstance(out, Tensor)
    return out


def _of_keys(values: Tensor | None, slab: Slab) -> Tensor | None:
    """Values per key (B, M) of a slab's keys."""
    return None if values is None else values.flatten()[slab.keys]


# --- three ways to put it together ----------------------------------------------------------------------------------


def _limit(q: Tensor) -> int:
    return SLAB_BYTES.get(q.device.type, SLAB_BYTES_ELSEWHERE)


def _gathered(scratch: Scratch, name: str, rows: Tensor, index: Tensor) -> Tensor:
    """rows (all, heads, D) by index (tiles, L) → (tiles, heads, L, D)."""
    return scratch.rows(name, rows, index).transpose(1, 2)


def _filled(q: Tensor, k: Tensor, v: Tensor, job: Job) -> Tensor:
    """Slab by slab, each written to its place."""
    flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    y = q.new_empty(*flat_q.shape[:2], v.shape[-1])
    scratch = Scratch()
    for slab in _slabs(q, k, job, _limit(q)):
        out = _attend(
            _gathered(scratch, "q", flat_q, slab.queries),
            _gathered(scratch, "k", flat_k, slab.keys),
            _gathered(scratch, "v", flat_v, slab.keys),
            slab,
            _of_keys(job.valid, slab),
            _of_keys(job.log_weight, slab),
            job,
        )
        y.index_copy_(0, slab.queries.flatten(), out.transpose(1, 2).flatten(0, 1).to(y.dtype))
    return y.unflatten(0, q.shape[:2])


def _assembled(q: Tensor, k: Tensor, v: Tensor, job: Job) -> Tensor:
    """The same without writing in place, for graphs: large slabs, put in order at the end."""
    flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    outs, places = [], []
    for slab in _slabs(q, k, job, SLAB_BYTES_ELSEWHERE):
        parts = (
            z[rows].transpose(1, 2) for z, rows in ((flat_q, slab.queries), (flat_k, slab.keys), (flat_v, slab.keys))
        )
        out = _attend(*parts, slab, _of_keys(job.valid, slab), _of_keys(job.log_weight, slab), job)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        places.append(slab.queries.flatten())
    return torch.cat(outs)[torch.cat(places).argsort()].unflatten(0, q.shape[:2])


class _Boxed(torch.autograd.Function):
    """`_filled` with a backward that goes through the slabs again, so that no gathered keys are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: Job) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.job = job
        return _filled(q, k, v, job)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        job: Job = ctx.job
        flat_q, flat_k, flat_v, flat_grad = (z.flatten(0, 1) for z in (q, k, v, grad))
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(flat_q)
        # a key's gradient is a sum over the tiles that see it
        dk, dv = (torch.zeros(z.shape, dtype=wide, device=z.device) for z in (flat_k, flat_v))
        scratch = Scratch()
        for slab in _slabs(q, k, job, _limit(q)):
            rows = (("q", flat_q, slab.queries), ("k", flat_k, slab.keys), ("v", flat_v, slab.keys))
            parts = [_gathered(scratch, *one).requires_grad_() for one in rows]
            with torch.enable_grad():
                out = _attend(*parts, slab, _of_keys(job.valid, slab), _of_keys(job.log_weight, slab), job)
            mine = _gathered(scratch, "grad", flat_grad, slab.queries).to(out.dtype)
            found = [z.transpose(1, 2).flatten(0, 1) for z in torch.autograd.grad(out, parts, mine)]
            dq.index_copy_(0, slab.queries.flatten(), found[0])
            for total, part in zip((dk, dv), found[1:], strict=True):
                total.index_add_(0, slab.keys.flatten(), part.to(wide))
        shapes = q.shape[:2], k.shape[:2], v.shape[:2]
        grads = (dq, dk.to(k.dtype), dv.to(v.dtype))
        return (*(z.unflatten(0, shape) for z, shape in zip(grads, shapes, strict=True)), None)
