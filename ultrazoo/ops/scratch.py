"""Memory that is used again: fresh pages cost a CPU more than what is written into them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Tensors by name, in memory that the next tensor of that name overwrites."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor on the device of `like`, of its dtype where none is given."""
        count, dtype = math.prod(shape), dtype or like.dtype
        kept = self._kept.get(name)
        if kept is None or kept.numel() < count or kept.dtype != dtype:
            kept = self._kept[name] = torch.empty(count, dtype=dtype, device=like.device)
        return kept[:count].view(*shape)

    def rows(self, name: str, z: Tensor, at: Tensor) -> Tensor:
        """Rows of `z` (all, …) by an index of any shape: (*at.shape, …)."""
        into = self(name, (at.numel(), *z.shape[1:]), z)
        return torch.index_select(z, 0, at.flatten(), out=into).unflatten(0, at.shape)
