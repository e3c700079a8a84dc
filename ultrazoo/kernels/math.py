"""Matmul, softmax, matmul, in chunks of queries: takes everything, on every device, and is the slowest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.graphs import followed
from ..ops.precision import without_autocast
from .dense import LOG2_E, exponentials
from .door import Inputs, KernelSpec
from .sdpa import additive

CHUNK_ELEMENTS = 1 << 26
"""Most scores held at once, over batch and heads."""


@dataclass(frozen=True, kw_only=True)
class MathSpec(KernelSpec):
    """Plain arithmetic with fp32 softmax; queries in chunks, so that memory grows with keys and not with their square.

    In a traced graph there is one chunk, and the scores (B, heads, Lq, Lk) appear as a tensor.
    """

    name: ClassVar[str] = "math"
    source: ClassVar[str] = "Vaswani et al., arXiv 1706.03762, equation 1"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu", "meta")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    takes: ClassVar[frozenset[str]] = frozenset({"key_mask", "bias", "log_weight", "lse", "unequal"})
    exportable: ClassVar[bool] = True

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        scale = inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
        mask = additive(inputs)
        if followed():
            return _rows(inputs.q, inputs, mask, scale)
        batch, heads, queries = inputs.q.shape[:3]
        step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * inputs.k.shape[2]))
        outs, lses = [], []
        for start in range(0, queries, step):
            rows = slice(start, start + step)
            part = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
            out, lse = _rows(inputs.q[:, :, rows], inputs, part, scale)
            outs.append(out)
            lses.append(lse)
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def _rows(q: Tensor, inputs: Inputs, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), inputs.k.to(wide), inputs.v.to(wide)
    if followed():
        out, lse = _traced(q, k, v, mask, scale)
    else:
        with without_autocast(q.device):
            out, lse = (_learning if torch.is_grad_enabled() else _in_place)(q, k, v, mask, scale)
    return out.to(inputs.q.dtype), lse


def _traced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is not None:
        scores = _masked(scores, mask)
    lse = _logsumexp(scores) if mask is not None and torch.is_grad_enabled() else scores.logsumexp(dim=-1)
    # a row without any key has lse = -inf: its weights are 0, not NaN
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
    return weights @ v, lse


def _learning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is None:
        return scores.softmax(-1) @ v, scores.logsumexp(-1)
    scores = _masked(scores, mask)
    none = scores.detach().amax(-1, keepdim=True) == float("-inf")
    # a gradient of zero, not NaN, for rows without any key
    scores = scores.masked_fill(none, 0.0)
    weights = scores.softmax(-1).masked_fill(none, 0.0)
    return weights @ v, scores.logsumexp(-1).masked_fill(none.squeeze(-1), float("-inf"))


def _in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with one tensor of scores, which becomes that of the weights."""
    # a mask's lowest numbers would not survive in powers of two
    unit = LOG2_E if mask is None else 1.0
    if k.shape[2] < q.shape[2]:
        k = k * (scale * unit)
    else:
        q = q * (scale * unit)
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    total, top, none = exponentials(scores, unit, whole=mask is None)
    out = (scores @ v).div_(total)
    # their sum is zero
    out = out if none is None else out.masked_fill_(none, 0.0)
    return out, (top + total.log()).squeeze(-1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _logsumexp(scores: Tensor) -> Tensor:
    """The same with a gradient of zero, not NaN, for rows without any key."""
    none = scores.detach().amax(dim=-1) == float("-inf")
    return scores.masked_fill(none.unsqueeze(-1), 0.0).logsumexp(dim=-1).masked_fill(none, float("-inf"))
