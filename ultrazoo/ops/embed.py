"""Sinusoidal embedding of the diffusion time (as in Wan 2.1: cosines first, base 10000)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(timestep: Tensor, channels: int, dtype: torch.dtype, base: float = 10000.0) -> Tensor:
    """(…,) timesteps on the 0..1000 scale → (…, channels) = [cos | sin], computed in fp64, returned in `dtype`."""
    half = channels // 2
    index = torch.arange(half, device=timestep.device, dtype=torch.float64)
    angles = timestep.to(torch.float64)[..., None] * torch.exp(-math.log(base) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
