"""Linears whose numbers may be changed: plain ones, in a plain type, with nothing around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .tensors import PLAIN


def require_plain(module: nn.Module, path: str, why: str) -> nn.Linear:
    """`module` as a linear; raises UsageError when it is quantised, wrapped by an adapter, parametrised or not loaded.

    `why` says what was going to be done to it.
    """
    home, name = type(module).__module__, type(module).__name__
    # torch has several of that name
    kind = f"{home}.{name}" if home.startswith("torch.") else f"{home.split('.')[0]}'s {name}"
    if hasattr(module, "base_layer"):
        raise UsageError(
            f"{path} is wrapped ({kind}): {why} would miss what the wrapper adds; merge or unload the adapter first"
        )
    if type(module) is not nn.Linear:
        raise UsageError(f"{path} is {kind}, not a plain linear: {why} needs torch's own; use the unquantised model")
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter.data) is not Tensor or parameter.dtype not in PLAIN:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(
                f"{path}.{name} is quantised ({type(parameter.data).__name__}, {dtype}): {why} needs plain floating-point "
                "numbers; use the unquantised model"
            )
        if parameter.is_meta:
            raise UsageError(f"{path}.{name} is on the meta device (offloaded or not loaded): {why} needs its numbers")
    return module


def added(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``W + scale · B A`` in the type of W (out, in), computed in fp32 or wider; A (rank, in), B (out, rank)."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(weight.device, wide), alpha=scale).to(weight.dtype)
