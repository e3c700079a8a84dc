"""Dense attention of rows that were put together from lists: what the kernels of block maps do with them.

On a CPU in fp32 or wider these are two matmuls with a softmax between them, on so few rows at a time that their scores stay in
the processor's cache: torch's fused operator cuts few queries into blocks that its matmuls are slow at. It does 16 bits, where
it never writes scores down, and rows too long for a cache. Elsewhere plain matmuls: the fused GPU forms give no log-sum-exp
together with a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.precision import without_autocast
from ..ops.scratch import Scratch

LOG2_E = math.log2(math.e)
SCORE_BYTES = 4 << 20
"""Bytes of scores held at a time on a CPU."""
ROW_BYTES = 1 << 23
"""Scores of one row from which on they have left any cache."""


def rows_at_once(q: Tensor, keys: int) -> int:
    """How many rows of q (rows, m, D) to give to `dense` at a time, with so many keys each."""
    if q.device.type != "cpu":
        return len(q)
    # whole rounds of threads, each of which multiplies the matrices of one row; no small rest at the end
    threads = torch.get_num_threads()
    most = max(1, SCORE_BYTES // (threads * q.shape[1] * keys * max(4, q.element_size()))) * threads
    return -(-len(q) // (-(-len(q) // most) * threads)) * threads


@dataclass(frozen=True)
class Added:
    """What is added to the scores of `dense`, (rows, 1, n). `whole`: every row has a key that counts."""

    scores: Tensor
    whole: bool

    def none(self) -> Tensor | None:
        """(rows, 1): which rows have no key that counts; None where all have one."""
        if self.whole:
            return None
        found = (self.scores == float("-inf")).all(-1)
        return found if found.any() else None


def dense(
    q: Tensor, k: Tensor, v: Tensor, added: Added | None, scale: float, out: Tensor, scratch: Scratch, lse: bool
) -> Tensor | None:
    """Attention of q (rows, m, D) over k (rows, n, D) and v (rows, n, Dv), written to `out` (rows, m, Dv); the log-sum-exp
    (rows, m), where asked at the least. No key at all: zeros and minus infinity.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        if q.device.type != "cpu":
            return _plain(q, k, v, added, scale, out)
        long = q.shape[1] * k.shape[1] * wide.itemsize > ROW_BYTES
        if k.shape[-1] == v.shape[-1] and (q.dtype != wide or long):
            return _fused(q, k, v, added, scale, out)
        return _in_cache(q, k, v, added, scale, out, scratch, lse)


def _in_cache(
    q: Tensor, k: Tensor, v: Tensor, added: Added | None, scale: float, out: Tensor, scratch: Scratch, lse: bool
) -> Tensor | None:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scratch("scores", (*q.shape[:2], k.shape[1]), q, wide)
    # the lowest numbers of `added` would not survive in powers of two
    unit = LOG2_E if added is None else 1.0
    # what stands in `scores` is not read
    torch.baddbmm(scores, q.to(wide), k.to(wide).transpose(1, 2), beta=0, alpha=scale * unit, out=scores)
    if added is not None:
        scores.add_(added.scores)
    total, top, none = exponentials(scores, unit, added is None or added.whole)
    if out.dtype == wide:
        torch.bmm(scores, v.to(wide), out=out).div_(total)
    else:
        out.copy_(torch.bmm(scores, v.to(wide)).div_(total))
    if none is not None:
        # their sum is zero
        out.masked_fill_(none, 0.0)
    return (top + total.log()).squeeze(-1) if lse else None


def exponentials(scores: Tensor, unit: float, whole: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores (…, m, n), multiplied by `unit` before, 1 or `LOG2_E`, become exponentials of their distance to the largest.

    Their sums, and the largest scores without `unit`, whose sum with the sums' logarithms is the log-sum-exp; and which rows have
    no key, whose sum is zero, None where all are `whole`: (…, m, 1) each. In powers of two, at which a CPU is faster.
    """
    top, none = scores.amax(-1, keepdim=True), None
    if not whole:
        none = top == float("-inf")
        top.masked_fill_(none, 0.0)
    scores.sub_(top)
    (scores if unit == LOG2_E else scores.mul_(LOG2_E / unit)).exp2_()
    return scores.sum(-1, keepdim=True), top / unit, none


def _fused(q: Tensor, k: Tensor, v: Tensor, added: Added | None, scale: float, out: Tensor) -> Tensor:
    mask = None if added is None else added.scores.unsqueeze(1)
    streams = (z.unsqueeze(1) for z in (q, k, v))
    found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *streams, 0.0, False, attn_mask=mask, scale=scale
    )
    out.copy_(found.squeeze(1))
    lse = lse.squeeze(1)
    none = None if added is None else added.none()
    # the operator says 0 where no key counts
    return lse if none is None else lse.masked_fill(none, float("-inf"))  # type: ignore[no-any-return]


def _plain(q: Tensor, k: Tensor, v: Tensor, added: Added | None, scale: float, out: Tensor) -> Tensor:
    """One tensor of scores, which becomes that of the weights."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(wide) * scale, k.to(wide).transpose(1, 2))
    if added is not None:
        scores.add_(added.scores)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out.copy_(torch.bmm(weights, v.to(wide)).div_(total.clamp(min=torch.finfo(wide).tiny)))
    return (top + total.log()).squeeze(-1)
