"""torch's scaled_dot_product_attention: flash, cuDNN, memory-efficient or math, as torch chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.graphs import followed
from .door import Inputs, KernelSpec, target


@dataclass(frozen=True, kw_only=True)
class SdpaSpec(KernelSpec):
    """`torch.nn.functional.scaled_dot_product_attention`; with lse, the flash operator behind it."""

    name: ClassVar[str] = "sdpa"
    source: ClassVar[str] = "torch.nn.functional.scaled_dot_product_attention"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu", "meta")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    takes: ClassVar[frozenset[str]] = frozenset({"key_mask", "bias", "log_weight", "lse", "unequal"})
    exportable: ClassVar[bool] = True

    @classmethod
    def reasons(cls, inputs: Inputs) -> list[str]:
        found = super().reasons(inputs)
        if inputs.return_lse:
            found += _lse_reasons(inputs)
        return found

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        if inputs.return_lse:
            out, lse = _FlashLse.apply(inputs.q, inputs.k, inputs.v, inputs.scale)  # type: ignore[no-untyped-call]
            return out, lse
        if target() == "onnx" and (inputs.key_mask is not None or inputs.log_weight is not None):
            inputs = keys_as_channel(inputs)
        mask = additive(inputs)
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, mask, scale=inputs.scale), None


UNREAL = 1e4
"""How far below the others the score of a masked key is put where it stands in the keys themselves; fp16 can hold it."""


def keys_as_channel(inputs: Inputs) -> Inputs:
    """The same attention without `key_mask` and `log_weight`: one more channel of q and k adds what a key has to its scores,
    -1e4 for masked keys.

    The CPU operator of onnxruntime takes masks with a row per query only, which would be a tensor of queries by keys.
    """
    q, k, mask = inputs.q, inputs.k, inputs.key_mask
    scale = q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    # (B, 1 | heads, 1, Lk)
    if inputs.log_weight is None:
        assert mask is not None
        scores = (mask.to(k.dtype) - 1) * UNREAL
    else:
        scores = inputs.log_weight.to(k.dtype)
        scores = scores if mask is None else scores.masked_fill(~mask, -UNREAL)
    row = scores.transpose(-1, -2).expand(k.shape[0], k.shape[1], -1, -1)
    return replace(
        inputs,
        q=F.pad(q, (0, 1), value=1 / scale),
        k=torch.cat([k, row], dim=-1),
        key_mask=None,
        log_weight=None,
        scale=scale,
    )


def additive(inputs: Inputs) -> Tensor | None:
    """key_mask, log_weight and bias as the one mask that scaled_dot_product_attention takes."""
    mask = inputs.key_mask
    for term in (inputs.log_weight, inputs.bias):
        if term is None:
            continue
        term = term.to(inputs.q.dtype)
        if mask is None:
            mask = term
        elif mask.dtype == torch.bool:
            mask = term.masked_fill(~mask, float("-inf"))
        else:
            mask = mask + term
    return mask


def _lse_reasons(inputs: Inputs) -> list[str]:
    """The operators that return lse are narrower than scaled_dot_product_attention."""
    found = []
    if inputs.q.device.type not in ("cpu", "cuda"):
        found.append(f"returns lse on cpu and cuda only, inputs are on {inputs.q.device.type}")
    if followed():
        found.append("does not return lse in a traced graph")
    if inputs.q.device.type == "cuda" and inputs.q.dtype not in (torch.float16, torch.bfloat16):
        found.append("returns lse on cuda for float16 and bfloat16 only")
    for name in ("key_mask", "bias", "log_weight"):
        if getattr(inputs, name) is not None:
            found.append(f"does not return lse together with a {name}")
    if inputs.v.shape[-1] != inputs.q.shape[-1]:
        found.append("returns lse for equal head sizes only")
    return found


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output, lse (B, heads, Lq) and what the backward operator wants besides."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        return out, lse, ()
    out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse, tuple(rest[:6])


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    cum_q, cum_k, max_q, max_k, seed, offset = rest
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset, scale=scale
    )


class _FlashLse(torch.autograd.Function):
    """Attention that returns lse and lets gradients flow through it.

    With P the attention weights and g the gradient of lse: dq += s·g·(P k), dk += s·Pᵀ(g q). Both are what the flash
    operators compute when k stands in for v: an output, and a gradient of the values.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        out, lse, rest = _flash(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse, *(r for r in rest if isinstance(r, Tensor)))
        ctx.rest = tuple(None if isinstance(r, Tensor) else r for r in rest)
        ctx.scale = scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        kept = iter(tensors)
        rest = tuple(next(kept) if r is None else r for r in ctx.rest)
        grad_out, grad_lse = grads
        dq, dk, dv = _flash_backward(grad_out.contiguous(), q, k, v, out, lse, rest, ctx.scale)
        scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        weight = (grad_lse * scale).to(q.dtype).unsqueeze(-1)
        mean_k, again, more = _flash(q, k, k, ctx.scale)
        _, _, extra = _flash_backward((weight * q).contiguous(), q, k, k, mean_k, again, more, ctx.scale)
        return dq + weight * mean_k, dk + extra, dv, None
