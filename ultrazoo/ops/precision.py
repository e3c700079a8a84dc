"""Arithmetic that must not be narrow: sums over many tokens, products of decays, inverses."""

from __future__ import annotations

import contextlib

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A ``with`` block whose matmuls keep the dtype of their inputs; the meta device knows no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
