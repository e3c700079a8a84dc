"""Block-sparse attention without a compiler: the key blocks of some query blocks are gathered, then dense attention (`dense`).

Query blocks are handled in groups of bounded memory, on a CPU some rows of a group at a time, and gathered for lists of similar
length; the backward gathers again. Softmax over the lists in fp32 or wider (Dao et al., arXiv 2205.14135, for the backward from the log-sum-exp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.blocks import block_valid, padded, unpadded
from ..ops.graphs import outside_graphs
from ..ops.scratch import Scratch
from .block_map import BlockMap, row_lists
from .dense import Added, dense, rows_at_once
from .door import Inputs, KernelSpec

GROUP_BYTES = {"cpu": 24 << 20, "cuda": 1 << 29}
"""Bytes of gathered keys, values and scores at a time, per kind of device; never more than all keys and values take."""
STEP_BYTES = 2 << 20
"""On a CPU, bytes of lists of a group, and of queries and output that are copied for it; its keys are gathered some rows at a
time."""
RUN_ROWS = 16
"""Fewest rows of one head in a chunk of a map that are handled where they stand, if their lists are of one length."""
SPREAD = 1.15
"""Lists that are gathered at once differ in length by at most this factor: shorter ones are filled and masked."""


@dataclass(frozen=True, kw_only=True)
class GatheredSpec(KernelSpec):
    """Gather, matmul, softmax, matmul, on lists of key blocks."""

    name: ClassVar[str] = "gathered"
    source: ClassVar[str] = "arXiv:2205.14135 for the backward; own scheme"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    takes: ClassVar[frozenset[str]] = frozenset({"key_mask", "log_weight", "block_map", "lse", "unequal"})
    needs: ClassVar[frozenset[str]] = frozenset({"block_map"})

    @classmethod
    @outside_graphs
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        block_map: BlockMap = inputs.block_map
        scale = inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
        q = padded(inputs.q, block_map.queries)
        k, v = padded(inputs.k, block_map.keys), padded(inputs.v, block_map.keys)
        # the backward's, too, whichever input learns
        wants_lse = inputs.return_lse or torch.is_grad_enabled()
        out, lse = _Gathered.apply(q, k, v, key_bias(inputs), block_map, scale, wants_lse)  # type: ignore[no-untyped-call]
        y = unpadded(out, block_map.queries)
        return y, unpadded(lse, block_map.queries) if inputs.return_lse else None


def key_bias(inputs: Inputs) -> Tensor | None:
    """What is added to the scores of every key, (B, heads | 1, key blocks, largest); None where nothing is.

    Minus infinity where a key does not count: slots past a block's end, and keys that `key_mask` leaves out.
    """
    blocks = inputs.block_map.keys
    slots = block_valid(blocks, inputs.k.device)
    if slots is None and inputs.key_mask is None and inputs.log_weight is None:
        return None
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    bias = torch.zeros(1, 1, blocks.tokens, device=inputs.k.device, dtype=wide)
    if inputs.log_weight is not None:
        bias = bias + inputs.log_weight[:, :, 0].to(wide)
    if inputs.key_mask is not None:
        bias = bias.masked_fill(~inputs.key_mask[:, :, 0], float("-inf"))
    bias = padded(bias, blocks)
    bias = bias if slots is None else bias.masked_fill(~slots, float("-inf"))
    return bias.expand(inputs.k.shape[0], -1, -1, -1)


def all_blocks_count(bias: Tensor | None) -> bool:
    """Has every block of `key_bias` a key that counts?"""
    return bias is None or bool((bias > float("-inf")).any(-1).all())


@dataclass
class _Group:
    """Some rows, flat over batch, heads and query blocks, of pairs `outer` of sample and head; and their lists, longest first:
    `counts` of the columns of `key_blocks` are real. `run`: the rows as a slice, where they follow each other."""

    row: Tensor
    outer: Tensor
    key_blocks: Tensor
    counts: list[int]
    run: slice | None = None

    def part(self, lo: int, hi: int) -> _Group:
        """Rows lo..hi, in as many columns as they use."""
        some = slice(lo, hi)
        return _Group(self.row[some], self.outer[some], self.key_blocks[some, : self.counts[lo]], self.counts[some])

    @property
    def real(self) -> Tensor | None:
        """Bool like `key_blocks`: which are of the list; None where all are."""
        width, device = self.key_blocks.shape[1], self.key_blocks.device
        if self.counts[-1] == width:
            return None
        return torch.arange(width, device=device) < torch.tensor(self.counts, device=device)[:, None]


def _groups(
    block_map: BlockMap, batch: int, heads: int, most: int, row_bytes: Callable[[int, bool], int], spread: float
) -> Iterator[_Group]:
    """Every row with a list, in groups of up to `most` bytes; rows without any key block are left out.

    `row_bytes`: of a row with that many key blocks, and whether the group is a run of rows. `spread`: lists of one
    group differ in length by at most that factor.
    """
    for lo, hi in block_map.chunks():
        lists = row_lists(block_map.rows(lo, hi), batch, heads)
        order = lists.counts.argsort(descending=True, stable=True)
        counts = lists.counts[order].tolist()
        at, end = 0, sum(count > 0 for count in counts)
        span = hi - lo
        # lists of one length keep the order of the rows
        equal = counts[0] == counts[-1] and span >= min(RUN_ROWS, block_map.queries.count)
        while at < end:
            rows = max(1, most // row_bytes(counts[at], equal))
            if equal and span < block_map.queries.count:
                rows = min(rows, span - at % span)
            stop = at + 1
            while stop < end and stop - at < rows and counts[stop] * spread >= counts[at]:
                stop += 1
            some = order[at:stop]
            outer, block = some // span, some % span + lo
            table = lists.table(some, counts[at])[0]
            first = at // span * block_map.queries.count + at % span + lo
            run = slice(first, first + stop - at) if equal else None
            yield _Group(outer * block_map.queries.count + block, outer, table, counts[at:stop], run)
            at = stop


def _at_once(block_map: BlockMap, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Group]:
    """Groups whose keys, values and scores are all there at a time."""
    batch, heads, _, slots, dim = k.shape
    most = min(GROUP_BYTES.get(k.device.type, 1 << 28), k.nbytes + v.nbytes)
    per_block = slots * (dim + v.shape[-1] + q.shape[3]) * max(4, k.element_size())
    return _groups(block_map, batch, heads, most, lambda width, _: width * per_block, SPREAD)


def _in_steps(block_map: BlockMap, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Group]:
    """Groups whose lists are there at a time, whatever their lengths, and copies of queries and output where they need them."""
    row = q.shape[3] * (q.shape[-1] + v.shape[-1]) * q.element_size()
    return _groups(block_map, *k.shape[:2], STEP_BYTES, lambda width, run: 16 * width + (0 if run else row), math.inf)


def _rows_of_step(queries: Tensor, width: int, k: Tensor, v: Tensor) -> int:
    """How many rows to gather keys for at a time, with lists of up to `width` blocks."""
    rows = rows_at_once(queries, width * k.shape[3])
    if queries.device.type != "cpu":
        return rows
    most = min(GROUP_BYTES["cpu"], k.nbytes + v.nbytes)
    return min(rows, max(1, most // (width * k.shape[3] * (k.shape[-1] + v.shape[-1]) * k.element_size())))


class _Flat:
    """Padded keys and values as rows of blocks, so that a gather copies whole blocks."""

    def __init__(self, k: Tensor, v: Tensor, bias: Tensor | None):
        self.heads, self.count = k.shape[1], k.shape[2]
        self.k, self.v, self.bias = k.reshape(-1, *k.shape[3:]), v.reshape(-1, *v.shape[3:]), bias
        self.whole = all_blocks_count(bias)

    def rows(self, group: _Group) -> Tensor:
        """Flat block indices of the group's lists, (rows, width)."""
        return group.outer[:, None] * self.count + group.key_blocks

    def keys(self, rows: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        """k and v of the blocks `rows` (rows, width): (rows, width * slots, D)."""
        found, at = [], rows.flatten()
        for name, z in (("k", self.k), ("v", self.v)):
            into = None if scratch is None else scratch(name, (len(at), *z.shape[1:]), z)
            found.append(torch.index_select(z, 0, at, out=into).view(len(rows), -1, z.shape[-1]))
        return found[0], found[1]

    def added(self, group: _Group) -> Added | None:
        """For the scores of the group's keys; None where there is nothing."""
        real = group.real
        if self.bias is None and real is None:
            return None
        slots = self.k.shape[1]
        if self.bias is None:
            assert real is not None
            wide = torch.promote_types(self.k.dtype, torch.float32)
            zeros = torch.zeros(real.shape, device=self.k.device, dtype=wide)
            masked = zeros.masked_fill(~real, float("-inf"))
            return Added(masked.repeat_interleave(slots, dim=1).unsqueeze(1), self.whole)
        bias = self.bias[(*_sample_and_head(group, self.heads, self.bias), group.key_blocks)]
        if real is not None:
            bias = bias.masked_fill(~real[..., None], float("-inf"))
        return Added(bias.flatten(1).unsqueeze(1), self.whole)


class _Gathered(torch.autograd.Function):
    """Padded q (B, heads, Gq, bq, D), k and v (B, heads, Gk, bk, D) → output and log-sum-exp (B, heads, Gq, bq), which is of
    use where it was wanted only."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        block_map: BlockMap,
        scale: float,
        wants_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        lse = torch.full(q.shape[:4] if wants_lse else (0,), float("-inf"), device=q.device, dtype=wide)
        reached = torch.zeros(math.prod(q.shape[:3]), device=q.device, dtype=torch.bool)
        flat, scratch = _Flat(k, v, bias), Scratch()
        flat_q, flat_out, flat_lse = q.flatten(0, 2), out.flatten(0, 2), lse.flatten(0, 2) if wants_lse else lse
        groups = _in_steps if q.device.type == "cpu" else _at_once
        for group in groups(block_map, q, k, v):
            if group.run is not None:
                queries, found = flat_q[group.run], flat_out[group.run]
            else:
                queries = scratch.rows("q", flat_q, group.row)
                found = scratch("found", (*queries.shape[:2], v.shape[-1]), q)
            at, norms, lo = flat.rows(group), [], 0
            while lo < len(queries):
                hi = lo + _rows_of_step(queries[lo:], group.counts[lo], k, v)
                part = group.part(lo, hi)
                keys, values = flat.keys(at[lo:hi, : part.counts[0]], scratch)
                added, into = flat.added(part), found[lo:hi]
                norms.append(dense(queries[lo:hi], keys, values, added, scale, into, scratch, wants_lse))
                lo = hi
            if group.run is None:
                flat_out.index_copy_(0, group.row, found)
            reached[group.row] = True
            if wants_lse:
                flat_lse.index_copy_(0, group.row, torch.cat([norm for norm in norms if norm is not None]))
        # rows without any key block
        if not reached.all():
            flat_out[~reached] = 0
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.block_map, ctx.scale = block_map, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        wide = lse.dtype
        d_k, d_v = torch.zeros_like(k, dtype=wide).flatten(0, 2), torch.zeros_like(v, dtype=wide).flatten(0, 2)
        d_bias = None if bias is None or not ctx.needs_input_grad[3] else torch.zeros_like(bias, dtype=wide)
        flat = _Flat(k, v, bias)
        flat_q, flat_out, flat_lse, flat_given = (z.flatten(0, 2) for z in (q, out, lse, grad_out))
        d_q = torch.zeros_like(flat_q, dtype=wide)
        for group in _at_once(ctx.block_map, q, k, v):
            rows, row = flat.rows(group), group.row
            keys, values = (z.to(wide) for z in flat.keys(rows))
            queries, g_out, norm = flat_q[row].to(wide), flat_given[row].to(wide), flat_lse[row].unsqueeze(-1)
            scores = torch.bmm(queries * ctx.scale, keys.transpose(1, 2))
            added = flat.added(group)
            scores = scores if added is None else scores + added.scores
            weights = (scores - norm.masked_fill(norm == float("-inf"), 0.0)).exp()
            along = (g_out * flat_out[row].to(wide)).sum(-1, keepdim=True) - grad_lse.flatten(0, 2)[row].unsqueeze(-1)
            d_scores = weights * (torch.bmm(g_out, values.transpose(1, 2)) - along)
            d_q[row] = torch.bmm(d_scores, keys) * ctx.scale
            at = rows.flatten()
            d_k.index_add_(0, at, torch.bmm(d_scores.transpose(1, 2), queries * ctx.scale).reshape(-1, *k.shape[3:]))
            d_v.index_add_(0, at, torch.bmm(weights.transpose(1, 2), g_out).reshape(-1, *v.shape[3:]))
            if d_bias is not None:
                d_bias = _add_bias(d_bias, group, k.shape[1], d_scores)
        d_k, d_v = d_k.view_as(k).to(k.dtype), d_v.view_as(v).to(v.dtype)
        return d_q.view_as(q).to(q.dtype), d_k, d_v, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _add_bias(d_bias: Tensor, group: _Group, heads: int, d_scores: Tensor) -> Tensor:
    """Add the gradients of the scores of a group's keys to those of the keys' bias."""
    found = d_scores.sum(1).unflatten(1, (group.key_blocks.shape[1], -1))
    real = group.real
    if real is not None:
        found = found.masked_fill(~real[..., None], 0.0)
    place = (*_sample_and_head(group, heads, d_bias), group.key_blocks)
    return d_bias.index_put(place, found, accumulate=True)


def _sample_and_head(group: _Group, heads: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (rows, 1) of the group's rows in a bias (B, heads | 1, ...)."""
    outer = group.outer[:, None]
    return outer // heads, outer % heads if bias.shape[1] > 1 else torch.zeros_like(outer)
