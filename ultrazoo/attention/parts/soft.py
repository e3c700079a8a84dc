"""Soft choices of blocks, with gradients: SoftTop-k (SLA2, arXiv 2602.12675, section 4) and attention by its weights.

A block pair has a weight ``M = sigmoid(P / tau + lambda_i)``, P the row's softmax over block scores and lambda_i such that
the row adds up to the number of blocks kept. M multiplies the exponentials of the softmax; a far field takes 1 - M. At
weights of 0 and 1 that is the hard choice. Every pair is computed: this is for training a router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from ...kernels import attend
from ...ops.blocks import Blocks
from .far import far_steps
from .scene import Scene

CERTAIN = 1e4
"""A logit whose sigmoid is 1 in every dtype."""
HALVINGS = 60


def soft_topk(p: Tensor, valid: Tensor, wanted: float | Tensor, tau: float) -> Tensor:
    """Logits of weights whose rows add up to `wanted` (one number, or one per sample) over valid blocks; `CERTAIN` where no more
    are valid.

    p (B, heads, rows, blocks) in [0, 1]; valid bool, broadcastable to it.
    """
    x, some = p / tau, valid.to(p.dtype)
    count = some.sum(-1, keepdim=True).clamp(min=1)
    with torch.no_grad():
        # x lies in [0, 1 / tau]: all at 0 need the highest shift, all at 1 / tau the lowest
        high = (wanted / count).clamp(max=1 - 1e-6).logit() + 1
        low = high - 1 / tau - 2
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            short = ((x + middle).sigmoid() * some).sum(-1, keepdim=True) < wanted
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        shift = (low + high) / 2
        at = (x + shift).sigmoid()
        slope = (at * (1 - at) * some).sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    # the halving has no gradient: that of lambda is the one that keeps the row's sum
    total = ((x + shift).sigmoid() * some).sum(-1, keepdim=True)
    shift = shift - (total - total.detach()) / slope
    return torch.where(count <= wanted, torch.full_like(x, CERTAIN), x + shift)


@dataclass
class SoftMap:
    """`make(lo, hi)`: logits (B, heads, hi - lo, selectable blocks) of query blocks lo..hi; blocks behind are seen by all."""

    queries: Blocks
    keys: Blocks
    make: Callable[[int, int], Tensor]

    def logits(self, lo: int, hi: int) -> Tensor:
        """(B, heads, hi - lo, key blocks)."""
        found = self.make(lo, hi)
        behind = self.keys.count - found.shape[-1]
        if not behind:
            return found
        return torch.cat([found, found.new_full((*found.shape[:3], behind), CERTAIN)], dim=-1)

    def unselected(self, lo: int, hi: int) -> Tensor:
        """1 - M."""
        return (-self.logits(lo, hi)).sigmoid()


def soft_map(scene: Scene, scores: Callable[[int, int], Tensor], wanted: Sequence[float], tau: float) -> SoftMap:
    """The soft choice by scores (B, heads, rows, blocks) of query blocks lo..hi, minus infinity where no key is valid; `wanted`:
    one number for all samples, or one each."""

    def logits(lo: int, hi: int) -> Tensor:
        found = scores(lo, hi)
        valid = found > float("-inf")
        p = found.masked_fill(~valid, torch.finfo(found.dtype).min).softmax(-1)
        return soft_topk(p, valid, p.new_tensor(wanted)[:, None, None, None], tau)

    # statistics are made once, outside of what is computed again in the backward
    assert scene.q_means.ndim == scene.k_means.ndim == scene.counts.ndim
    return SoftMap(scene.place.queries, scene.place.keys, logits)


def soft_near(scene: Scene, chosen: SoftMap, mask: Tensor | None) -> Tensor:
    """Softmax over all keys with weights of block pairs: (B, heads, queries, D). Some query blocks at a time."""
    blocks, device = chosen.queries, scene.q.device
    widths = torch.tensor(chosen.keys.sizes, device=device)
    parts = []
    for lo, hi in far_steps(scene, chosen.keys.tokens):
        tokens = slice(blocks.starts[lo], blocks.starts[hi])
        heights = torch.tensor(blocks.sizes[lo:hi], device=device)

        def near(q: Tensor, k: Tensor, v: Tensor, lo: int = lo, hi: int = hi, heights: Tensor = heights) -> Tensor:
            bias = logsigmoid(chosen.logits(lo, hi)).repeat_interleave(heights, dim=2).repeat_interleave(widths, dim=3)
            found = attend(q, k, v, key_mask=mask, bias=bias, kernel="math")
            assert isinstance(found, Tensor)
            return found

        given = (scene.q[:, :, tokens], scene.k, scene.v)
        learns = torch.is_grad_enabled()
        parts.append(checkpoint(near, *given, use_reentrant=False) if learns else near(*given))
    return torch.cat(parts, dim=2)
