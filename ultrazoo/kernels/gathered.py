"""Block-sparse attention without a compiler: the key blocks of some query blocks are gathered, then dense attention (`dense`).

Query blocks are handled in groups of similar list length and bounded memory; the backward gathers again. Softmax over the
lists in fp32 or wider (Dao et al., arXiv 2205.14135, for the backward from the log-sum-exp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.blocks import block_valid, padded, unpadded
from ..ops.graphs import outside_graphs
from ..ops.scratch import Scratch
from .block_map import BlockMap, RowLists, row_lists
from .dense import dense, rows_at_once
from .door import Inputs, KernelSpec

GROUP_BYTES = {"cpu": 24 << 20, "cuda": 1 << 29}
"""Bytes of gathered keys, values and scores per group, per kind of device; never more than all keys and values take."""
SPREAD = 1.15
"""Lists in one group differ in length by at most this factor: shorter ones are filled and masked."""


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


@dataclass
class _Group:
    """Some rows (batch, head, query block) with lists of similar length."""

    batch: Tensor
    head: Tensor
    block: Tensor
    key_blocks: Tensor
    real: Tensor | None


def _groups(block_map: BlockMap, k: Tensor, v: Tensor, query_slots: int) -> Iterator[_Group]:
    """Every row with a list, in groups of bounded memory; rows without any key block are left out."""
    batch, heads, _, slots, dim = k.shape
    per_key = slots * (dim + v.shape[-1] + query_slots) * max(4, k.element_size())
    most = min(GROUP_BYTES.get(k.device.type, 1 << 28), k.nbytes + v.nbytes)
    for lo, hi in block_map.chunks():
        lists = row_lists(block_map.rows(lo, hi), batch, heads)
        order = lists.counts.argsort(descending=True, stable=True)
        counts = lists.counts[order].tolist()
        at, end = 0, sum(count > 0 for count in counts)
        while at < end:
            width = counts[at]
            rows = max(1, most // (width * per_key))
            stop = at + 1
            while stop < end and stop - at < rows and counts[stop] * SPREAD >= width:
                stop += 1
            yield _group(lists, order[at:stop], width, counts[stop - 1] < width, hi - lo, heads, lo)
            at = stop


def _group(lists: RowLists, rows: Tensor, width: int, uneven: bool, chunk: int, heads: int, lo: int) -> _Group:
    table, real = lists.table(rows, width)
    outer, block = rows // chunk, rows % chunk + lo
    return _Group(outer // heads, outer % heads, block, table, real if uneven else None)


class _Flat:
    """Padded keys and values as rows of blocks, so that a gather copies whole blocks."""

    def __init__(self, k: Tensor, v: Tensor, bias: Tensor | None):
        self.heads, self.count = k.shape[1], k.shape[2]
        self.k, self.v, self.bias = k.reshape(-1, *k.shape[3:]), v.reshape(-1, *v.shape[3:]), bias

    def rows(self, group: _Group) -> Tensor:
        """Flat block indices of the group's lists, (rows * width,)."""
        outer = group.batch * self.heads + group.head
        return (outer[:, None] * self.count + group.key_blocks).flatten()

    def keys(self, flat: Tensor, width: int, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        """k and v of lists of `width` blocks: (rows, width * slots, D)."""
        found = []
        for name, z in (("k", self.k), ("v", self.v)):
            into = None if scratch is None else scratch(name, (len(flat), *z.shape[1:]), z)
            found.append(torch.index_select(z, 0, flat, out=into).view(len(flat) // width, -1, z.shape[-1]))
        return found[0], found[1]

    def bias_of(self, group: _Group) -> Tensor | None:
        """(rows, 1, width * slots) to add to the scores, None where there is nothing."""
        if self.bias is None and group.real is None:
            return None
        slots = self.k.shape[1]
        if self.bias is None:
            assert group.real is not None
            wide = torch.promote_types(self.k.dtype, torch.float32)
            zeros = torch.zeros(group.real.shape, device=self.k.device, dtype=wide)
            masked = zeros.masked_fill(~group.real, float("-inf"))
            return masked.repeat_interleave(slots, dim=1).unsqueeze(1)
        head = group.head if self.bias.shape[1] > 1 else torch.zeros_like(group.head)
        bias = self.bias[group.batch[:, None], head[:, None], group.key_blocks]
        if group.real is not None:
            bias = bias.masked_fill(~group.real[..., None], float("-inf"))
        return bias.flatten(1).unsqueeze(1)


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
        reached = torch.zeros(q.shape[:3], device=q.device, dtype=torch.bool)
        flat, scratch = _Flat(k, v, bias), Scratch()
        for group in _groups(block_map, k, v, q.shape[3]):
            place = (group.batch, group.head, group.block)
            queries, at, added = q[place], flat.rows(group), flat.bias_of(group)
            found = scratch("found", (*queries.shape[:2], v.shape[-1]), q)
            norms = []
            width = group.key_blocks.shape[1]
            step = rows_at_once(queries, width * k.shape[3])
            for lo in range(0, len(queries), step):
                some = slice(lo, lo + step)
                keys, values = flat.keys(at[lo * width : (lo + step) * width], width, scratch)
                some_added = None if added is None else added[some]
                norms.append(dense(queries[some], keys, values, some_added, scale, found[some], scratch, wants_lse))
            out[place] = found
            reached[place] = True
            if wants_lse:
                lse[place] = torch.cat([norm for norm in norms if norm is not None])
        # rows without any key block
        if not reached.all():
            out[~reached] = 0
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.block_map, ctx.scale = block_map, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        wide = lse.dtype
        d_q = torch.zeros_like(q, dtype=wide)
        d_k, d_v = torch.zeros_like(k, dtype=wide).flatten(0, 2), torch.zeros_like(v, dtype=wide).flatten(0, 2)
        d_bias = None if bias is None or not ctx.needs_input_grad[3] else torch.zeros_like(bias, dtype=wide)
        flat = _Flat(k, v, bias)
        for group in _groups(ctx.block_map, k, v, q.shape[3]):
            at = flat.rows(group)
            keys, values = (z.to(wide) for z in flat.keys(at, group.key_blocks.shape[1]))
            place = (group.batch, group.head, group.block)
            queries, g_out, norm = q[place].to(wide), grad_out[place].to(wide), lse[place].unsqueeze(-1)
            scores = torch.bmm(queries * ctx.scale, keys.transpose(1, 2))
            added = flat.bias_of(group)
            scores = scores if added is None else scores + added
            weights = (scores - norm.masked_fill(norm == float("-inf"), 0.0)).exp()
            along = (g_out * out[place].to(wide)).sum(-1, keepdim=True) - grad_lse[place].unsqueeze(-1)
            d_scores = weights * (torch.bmm(g_out, values.transpose(1, 2)) - along)
            d_q[place] = torch.bmm(d_scores, keys) * ctx.scale
            d_k.index_add_(0, at, torch.bmm(d_scores.transpose(1, 2), queries * ctx.scale).reshape(-1, *k.shape[3:]))
            d_v.index_add_(0, at, torch.bmm(weights.transpose(1, 2), g_out).reshape(-1, *v.shape[3:]))
            if d_bias is not None:
                d_bias = _add_bias(d_bias, group, d_scores)
        d_k, d_v = d_k.view_as(k).to(k.dtype), d_v.view_as(v).to(v.dtype)
        return d_q.to(q.dtype), d_k, d_v, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _add_bias(d_bias: Tensor, group: _Group, d_scores: Tensor) -> Tensor:
    """Add the gradients of the scores of a group's keys to those of the keys' bias."""
    found = d_scores.sum(1).unflatten(1, (group.key_blocks.shape[1], -1))
    if group.real is not None:
        found = found.masked_fill(~group.real[..., None], 0.0)
    head = group.head if d_bias.shape[1] > 1 else torch.zeros_like(group.head)
    return d_bias.index_put((group.batch[:, None], head[:, None], group.key_blocks), found, accumulate=True)
