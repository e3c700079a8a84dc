"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) with fp32 statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .graphs import followed


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension; x (…, C), weight (C,) or None.

    Statistics and scaling in fp32 for fp16 and bf16 inputs, result in the dtype of x.
    """
    if x.device.type != "cpu" or followed():
        size = (x.shape[-1],)
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, size, weight, eps)
        wide = x.float()
        # ONNX's norm has a scale: without one here an exporter makes ones as large as x
        normed = F.rms_norm(wide, size, wide.new_ones(size), eps).to(x.dtype)
        return normed if weight is None else normed * weight
    # one reading pass for the norm, one for the scale: three times fewer passes than F.rms_norm on a CPU
    wide_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype)
    scale = (norm.square() / x.shape[-1] + eps).rsqrt()
    normed = (x * scale).to(x.dtype)
    if weight is None:
        return normed
    return normed * weight if torch.is_grad_enabled() else normed.mul_(weight)
