"""Block-sparse attention of single queries: one key block at a time, with the queries that chose it.

Where every query has a list of its own, gathering its keys moves more than it computes. Here the queries that chose a block
are gathered and meet its keys in dense attention; a query's answers are then summed with the weights that their log-sum-exps
give (as in MoBA, arXiv 2502.13189). The backward makes the weights again from the log-sum-exp (Dao et al., arXiv 2205.14135).

Queries are handled in pieces of bounded memory, in which blocks of one size that as many queries chose stand side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.blocks import Blocks, block_index
from ..ops.graphs import outside_graphs
from ..ops.scratch import Scratch
from .block_map import BlockMap
from .dense import Added, dense
from .door import Inputs, KernelSpec
from .gathered import all_blocks_count, key_bias

PIECE_BYTES = {"cpu": 28 << 20, "cuda": 1 << 29}
"""Bytes of answers that wait for their sum, and of the map that says where they stand, per kind of device."""
GROUP_BYTES = {"cpu": 2 << 20, "cuda": 1 << 29}
"""Bytes of gathered queries and scores made at a time, per kind of device."""
SPREAD = 1.25
"""Numbers of queries in one group differ by at most this factor: missing ones are filled and left out."""


@dataclass(frozen=True, kw_only=True)
class ByKeySpec(KernelSpec):
    """Matmul, softmax and matmul per key block, for the queries that chose it."""

    name: ClassVar[str] = "by_key"
    source: ClassVar[str] = "arXiv:2502.13189 for the order, arXiv:2205.14135 for the sums; own scheme"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    takes: ClassVar[frozenset[str]] = frozenset({"key_mask", "block_map", "lse", "unequal"})
    needs: ClassVar[frozenset[str]] = frozenset({"block_map"})
    beside: ClassVar[Mapping[str, Any]] = {"order": {"name": "tiles_by_query"}}

    @classmethod
    def never(cls, passes: Collection[str], queries: Blocks | None = None, keys: Blocks | None = None) -> list[str]:
        found = super().never(passes, queries, keys)
        if queries is not None and queries.largest > 1:
            found.append(f"is for blocks of one query, they have up to {queries.largest}")
        return found

    @classmethod
    @outside_graphs
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        scale = inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
        # blocks meet queries with the keys that they have, so that there are no slots to leave out
        bias = None if inputs.key_mask is None else key_bias(inputs)
        out, lse = _ByKey.apply(inputs.q, inputs.k, inputs.v, bias, inputs.block_map, scale)  # type: ignore[no-untyped-call]
        return out, lse if inputs.return_lse else None


@dataclass
class _Group:
    """Key blocks of one size that about as many queries chose.

    `blocks` (g,), over batch and heads; `keys` (g, size): rows of keys, over batch and heads; `queries` (g, width): rows of
    queries, over batch and heads; `real` bool (g, width), None where all are: which are not there to fill up; `slots`: where their
    answers stand in the piece.
    """

    blocks: Tensor
    keys: Tensor
    queries: Tensor
    real: Tensor | None
    slots: slice


@dataclass
class _Piece:
    """Some queries with all the blocks they chose: choice i is of row `row[i]` and answered in slot ``slot[i]``."""

    rows: slice
    row: Tensor
    slot: Tensor
    offsets: Tensor
    slots: int
    groups: list[_Group]

    def summed(self, answers: Tensor, weights: Tensor | None) -> Tensor:
        """(slots, D) → (rows, D): every row's answers, weighed."""
        return F.embedding_bag(self.slot, answers, self.offsets, mode="sum", per_sample_weights=weights)


def _pieces(block_map: BlockMap, batch: int, heads: int, dim: int) -> Iterator[_Piece]:
    """Every query that chose a block, in pieces of bounded memory."""
    held = PIECE_BYTES.get(block_map.device.type, 1 << 28)
    most, rows = held // (4 * dim), max(1, held // (4 * block_map.keys.count))
    for lo, hi in block_map.chunks():
        chosen = block_map.rows(lo, hi).expand(batch, heads, -1, -1)
        for pair in range(batch * heads):
            mine = chosen[pair // heads, pair % heads]
            counts = mine.sum(-1)
            ends = counts.cumsum(0)
            # as much in each, but for what one query more or less has
            pieces = -(-int(ends[-1]) // most)
            some = min(most, int(ends[-1]) // max(1, pieces) + block_map.keys.count)
            start = 0
            while start < hi - lo:
                before = int(ends[start - 1]) if start else 0
                stop = max(start + 1, int(torch.searchsorted(ends, before + some, right=True)))
                stop = min(stop, start + rows)
                if int(ends[stop - 1]) > before:
                    first = pair * block_map.queries.count + lo + start
                    yield _piece(mine[start:stop], counts[start:stop], block_map.keys, first, pair, dim)
                start = stop


def _piece(chosen: Tensor, counts: Tensor, keys: Blocks, first: int, pair: int, dim: int) -> _Piece:
    """Bool (rows, blocks) of the queries from row `first` on, which belong to one pair of sample and head."""
    rows, device = len(chosen), chosen.device
    nth = chosen.cumsum(0, dtype=torch.int32)
    numbers = nth[-1].long()
    sizes = torch.tensor(keys.sizes, device=device)
    order = numbers.argsort(descending=True, stable=True)
    order = order[sizes[order].argsort(descending=True, stable=True)]
    many, size = numbers[order].tolist(), sizes[order].tolist()
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    spans = _spans(many, size, max(1, GROUP_BYTES.get(device.type, 1 << 28) // (4 * dim)), threads)
    # the first slot of each block's answers; the choices of a block, in the order of its queries, follow it
    begins, slots = [0] * keys.count, 0
    for lo, hi in spans:
        begins[lo:hi] = range(slots, slots + (hi - lo) * many[lo], many[lo])
        slots += (hi - lo) * many[lo]
    begin = torch.empty_like(nth[0]).index_copy_(0, order, torch.tensor(begins, device=device, dtype=nth.dtype))
    at = chosen.flatten().nonzero()[:, 0]
    slot = nth.add_(begin - 1).flatten().index_select(0, at).long()
    row = torch.arange(rows, device=device).repeat_interleave(counts, output_size=len(slot))
    queries = torch.full((slots,), -1, dtype=torch.int64, device=device).index_copy_(0, slot, row + first)
    groups = []
    for lo, hi in spans:
        stand, blocks = slice(begins[lo], begins[lo] + (hi - lo) * many[lo]), order[lo:hi]
        some = queries[stand].view(hi - lo, many[lo])
        real = None if many[hi - 1] == many[lo] else some >= 0
        theirs = block_index(keys, device)[blocks, : size[lo]] + pair * keys.tokens
        groups.append(_Group(blocks + pair * keys.count, theirs, some.clamp(min=first), real, stand))
    return _Piece(slice(first, first + rows), row, slot, counts.cumsum(0) - counts, slots, groups)


def _spans(many: list[int], size: list[int], most: int, threads: int) -> list[tuple[int, int]]:
    """Numbers of queries, descending among blocks of one size → ranges of blocks that make groups: none is empty, about `most`
    queries in each, and as many blocks for each of the threads, which multiply the matrices of one block at a time."""
    found, lo = [], 0
    while lo < len(many):
        hi = lo + 1
        while hi < len(many) and size[hi] == size[lo] and 0 < many[lo] <= many[hi] * SPREAD:
            if (hi - lo + 1) * many[lo] > most:
                break
            hi += 1
        if hi - lo > threads:
            hi -= (hi - lo) % threads
        if many[lo]:
            found.append((lo, hi))
        lo = hi
    return found


class _ByKey(torch.autograd.Function):
    """q (B, heads, N, D), k and v (B, heads, M, D), bias (B, heads | 1, Gk, bk) → output, lse (B, heads, N)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, block_map: BlockMap, scale: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        out = torch.zeros(len(queries), v.shape[-1], device=q.device, dtype=q.dtype)
        lse = torch.full(queries.shape[:1], float("-inf"), device=q.device, dtype=wide)
        scratch, added = Scratch(), _KeyBias(bias, q.shape[1])
        for piece in _pieces(block_map, *q.shape[:2], q.shape[-1]):
            answers = scratch("answers", (piece.slots, v.shape[-1]), queries, wide)
            norms = queries.new_empty(piece.slots, dtype=wide)
            for group in piece.groups:
                mine = scratch.rows("mine", queries, group.queries)
                theirs = [scratch.rows(name, z, group.keys) for name, z in (("keys", keys), ("values", values))]
                into = answers[group.slots].unflatten(0, group.queries.shape)
                norm = dense(mine, *theirs, added.of(group), scale, into, scratch, lse=True)
                assert norm is not None
                norms[group.slots] = norm.flatten()
            norm = norms.index_select(0, piece.slot)
            top = lse[piece.rows].scatter_reduce(0, piece.row, norm, "amax")
            level = top.masked_fill(top == float("-inf"), 0.0)
            weights = norm.sub_(level.index_select(0, piece.row)).exp_()
            total = torch.zeros_like(top).index_add_(0, piece.row, weights)
            lse[piece.rows] = level + total.log()
            weights /= total.clamp(min=torch.finfo(wide).tiny).index_select(0, piece.row)
            out[piece.rows] = piece.summed(answers, weights).to(q.dtype)
        out, lse = out.view(*q.shape[:3], -1), lse.view(q.shape[:3])
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.block_map, ctx.scale = block_map, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        wide = lse.dtype
        queries, keys, values, given = (z.flatten(0, 2) for z in (q, k, v, grad_out))
        norms = lse.masked_fill(lse == float("-inf"), 0.0).flatten()
        along = ((grad_out.to(wide) * out.to(wide)).sum(-1) - grad_lse).flatten()
        d_q = torch.zeros(queries.shape, device=q.device, dtype=wide)
        d_k, d_v = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        bias_of = _KeyBias(bias, q.shape[1])
        for piece in _pieces(ctx.block_map, *q.shape[:2], q.shape[-1]):
            parts = queries.new_empty(piece.slots, q.shape[-1], dtype=wide)
            for group in piece.groups:
                at, shape = group.queries.flatten(), (*group.queries.shape, -1)
                mine, g_out = (z.index_select(0, at).view(*shape).to(wide) for z in (queries, given))
                theirs, their_values = (z[group.keys].to(wide) for z in (keys, values))
                scores = torch.bmm(mine * ctx.scale, theirs.transpose(1, 2))
                added = bias_of.of(group)
                scores = scores if added is None else scores.add_(added.scores)
                weights = scores.sub_(norms[at].view(*shape)).exp_()
                if group.real is not None:
                    weights = weights.masked_fill_(~group.real[..., None], 0.0)
                d_scores = torch.bmm(g_out, their_values.transpose(1, 2)).sub_(along[at].view(*shape)).mul_(weights)
                d_scores = d_scores.mul_(ctx.scale)
                parts[group.slots] = torch.bmm(d_scores, theirs).flatten(0, 1)
                d_k.index_add_(0, group.keys.flatten(), torch.bmm(d_scores.transpose(1, 2), mine).flatten(0, 1))
                d_v.index_add_(0, group.keys.flatten(), torch.bmm(weights.transpose(1, 2), g_out).flatten(0, 1))
            d_q[piece.rows] = piece.summed(parts, None)
        d_q = d_q.view(q.shape).to(q.dtype)
        return d_q, d_k.view(k.shape).to(k.dtype), d_v.view(v.shape).to(v.dtype), None, None, None


class _KeyBias:
    """What is added to the scores of each block's keys."""

    def __init__(self, bias: Tensor | None, heads: int):
        self.bias = None if bias is None else bias.expand(-1, heads, -1, -1).flatten(0, 2)
        self.whole = all_blocks_count(bias)

    def of(self, group: _Group) -> Added | None:
        """For the scores of the group's keys; None where there is nothing."""
        if self.bias is None:
            return None
        return Added(self.bias[group.blocks, : group.keys.shape[1]].unsqueeze(1), self.whole)
