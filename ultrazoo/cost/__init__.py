"""What a model costs before it exists: FLOPs, parameters, memory, seconds. Torch-free."""

from __future__ import annotations

from .gpus import GPUS, Gpu, gpu
from .memory import ByMode, Fit
from .price import Clip, LayerPlan, Priced, Totals, full_flops, price
from .seconds import Seconds

__all__ = [
    "GPUS",
    "ByMode",
    "Clip",
    "Fit",
    "Gpu",
    "LayerPlan",
    "Priced",
    "Seconds",
    "Totals",
    "full_flops",
    "gpu",
    "price",
]
