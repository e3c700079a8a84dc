"""Block-sparse attention of single queries: one key block at a time, with the queries that chose it.

Where every query has a list of its own, gathering its keys moves more than it computes. Here the keys of a block stay where
they are and meet their queries in one matmul; sums over blocks are kept under a running maximum, the backward makes the
weights again from the log-sum-exp (Dao et al., arXiv 2205.14135; by key block as in MoBA, arXiv 2502.13189).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.blocks import Blocks
from .block_map import BlockMap, row_lists
from .door import Inputs, KernelSpec

GROUP_BYTES = {"cpu": 1, "cuda": 1 << 29}
"""Bytes of scores of several heads made at a time, per kind of device; on a CPU one head is enough."""
SPREAD = 1.5
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
    @torch.compiler.disable
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        scale = inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
        mask = None if inputs.key_mask is None else inputs.key_mask[:, :, 0].expand(*inputs.k.shape[:3]).flatten(0, 1)
        out, lse = _ByKey.apply(inputs.q, inputs.k, inputs.v, mask, inputs.block_map, scale)  # type: ignore[no-untyped-call]
        return out, lse if inputs.return_lse else None


@dataclass
class _Meeting:
    """A key block of some (batch, head) pairs and its queries.

    `pairs` (g,), `keys`: the block's tokens, `at` (g * width,): rows of queries, one past the last where there is none.
    """

    pairs: Tensor
    keys: slice
    at: Tensor
    width: int


def _meetings(block_map: BlockMap, batch: int, heads: int, row_bytes: int) -> Iterator[_Meeting]:
    """Every key block with the queries that chose it; within one meeting no query comes twice."""
    blocks, rows = block_map.keys, block_map.queries.count + 1
    most = GROUP_BYTES.get(block_map.device.type, 1 << 28)
    for lo, hi in block_map.chunks():
        lists = row_lists(block_map.rows(lo, hi).transpose(-1, -2), batch, heads)
        counts = lists.counts.view(batch * heads, blocks.count)
        order = counts.argsort(dim=0, descending=True, stable=True)
        table = counts.gather(0, order).t().tolist()
        for block, numbers in enumerate(table):
            keys = slice(blocks.starts[block], blocks.starts[block + 1])
            start, end = 0, sum(number > 0 for number in numbers)
            while start < end:
                width = numbers[start]
                room = max(1, most // (width * (keys.stop - keys.start) * row_bytes))
                stop = start + 1
                while stop < end and stop - start < room and numbers[stop] * SPREAD >= width:
                    stop += 1
                pairs = order[start:stop, block]
                found, real = lists.table(pairs * blocks.count + block, width)
                at = torch.where(real, found + lo, rows - 1) + pairs[:, None] * rows
                yield _Meeting(pairs, keys, at.flatten(), width)
                start = stop


def _with_spare(z: Tensor) -> Tensor:
    """(B, heads, N, …) → (B * heads * (N + 1), …): a row of zeros behind every head's."""
    return torch.cat([z, z.new_zeros(*z.shape[:2], 1, *z.shape[3:])], dim=2).flatten(0, 2)


def _without_spare(z: Tensor, batch: int, heads: int) -> Tensor:
    return z.unflatten(0, (batch, heads, -1))[:, :, :-1]


class _ByKey(torch.autograd.Function):
    """q (B, heads, N, D), k and v (B, heads, M, D), mask (B * heads, M) → output and log-sum-exp (B, heads, N)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_map: BlockMap, scale: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        batch, heads = q.shape[:2]
        queries, keys, values = _with_spare(q), k.flatten(0, 1), v.flatten(0, 1)
        total = torch.zeros(queries.shape[0], 1, device=q.device, dtype=wide)
        top, sums = torch.full_like(total, float("-inf")), total.new_zeros(total.shape[0], v.shape[-1])
        for one in _meetings(block_map, batch, heads, total.element_size()):
            scores = _scores(one, queries, keys, mask, scale)
            before = top.index_select(0, one.at)
            now = torch.maximum(before, scores.amax(-1).flatten()[:, None])
            level = now.masked_fill(now == float("-inf"), 0.0)
            weights = scores.sub_(level.view(*scores.shape[:2], 1)).exp_()
            less = (before - level).exp_()
            added = torch.bmm(weights, values[one.pairs, one.keys].to(wide)).flatten(0, 1)
            total.index_copy_(0, one.at, total.index_select(0, one.at).mul_(less).add_(weights.sum(-1).view(-1, 1)))
            sums.index_copy_(0, one.at, sums.index_select(0, one.at).mul_(less).add_(added))
            top.index_copy_(0, one.at, now)
        # no key at all: zeros and minus infinity
        out = sums.div_(total.clamp(min=torch.finfo(wide).tiny))
        lse = _without_spare((top + total.log())[:, 0], batch, heads).contiguous()
        out = _without_spare(out, batch, heads).to(q.dtype).contiguous()
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.block_map, ctx.scale = block_map, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        wide, (batch, heads) = lse.dtype, q.shape[:2]
        queries, keys, values, given = _with_spare(q), k.flatten(0, 1), v.flatten(0, 1), _with_spare(grad_out)
        # rows without keys have no weights: any finite number does
        norms = _with_spare(lse.masked_fill(lse == float("-inf"), 0.0))
        along = _with_spare((grad_out.to(wide) * out.to(wide)).sum(-1) - grad_lse)
        d_q = torch.zeros_like(queries, dtype=wide)
        d_k, d_v = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        for one in _meetings(ctx.block_map, batch, heads, lse.element_size()):
            scores = _scores(one, queries, keys, mask, ctx.scale)
            shape = (*scores.shape[:2], -1)
            weights = scores.sub_(norms.index_select(0, one.at).view(*shape)).exp_()
            mine, g_out = (z.index_select(0, one.at).view(*shape).to(wide) for z in (queries, given))
            if one.pairs.numel() > 1:
                # rows that fill up a shorter list are nobody's
                spare = (one.at + 1) % (q.shape[2] + 1) == 0
                weights = weights.masked_fill(spare.view(*shape), 0.0)
            back = torch.bmm(g_out, values[one.pairs, one.keys].to(wide).transpose(1, 2))
            d_scores = weights * (back - along.index_select(0, one.at).view(*shape)) * ctx.scale
            d_q.index_add_(0, one.at, torch.bmm(d_scores, keys[one.pairs, one.keys].to(wide)).flatten(0, 1))
            d_k[one.pairs, one.keys] += torch.bmm(d_scores.transpose(1, 2), mine)
            d_v[one.pairs, one.keys] += torch.bmm(weights.transpose(1, 2), g_out)
        d_q = _without_spare(d_q, batch, heads)
        return d_q.to(q.dtype), d_k.view_as(k).to(k.dtype), d_v.view_as(v).to(v.dtype), None, None, None


def _scores(one: _Meeting, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(g, width, keys), fp32 or wider."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    mine = queries.index_select(0, one.at).to(wide).mul_(scale).view(len(one.pairs), one.width, -1)
    found = torch.bmm(mine, keys[one.pairs, one.keys].to(wide).transpose(1, 2))
    return found if mask is None else found.masked_fill_(~mask[one.pairs, one.keys].unsqueeze(1), float("-inf"))
