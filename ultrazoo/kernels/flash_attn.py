"""The flash-attn package, version 2 (Dao, arXiv 2307.08691). Ships as source; used where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .door import Inputs, KernelSpec


@lru_cache(maxsize=1)
def _package() -> tuple[Any, str]:
    """The package, or why it cannot be used."""
    if importlib.util.find_spec("flash_attn") is None:
        return None, "flash-attn is not installed (pip install flash-attn; it compiles from source)"
    try:
        package = importlib.import_module("flash_attn")
    except Exception as error:  # a build for another torch fails at import in many ways
        return None, f"flash-attn does not import: {type(error).__name__}: {error}"
    if not torch.cuda.is_available():
        return None, "flash-attn needs a CUDA device, this machine shows none"
    return package, ""


@dataclass(frozen=True, kw_only=True)
class FlashAttnSpec(KernelSpec):
    """`flash_attn.flash_attn_func`, token-major."""

    name: ClassVar[str] = "flash_attn"
    source: ClassVar[str] = "arXiv:2307.08691"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    head_dims: ClassVar[tuple[int, int]] = (8, 256)

    @classmethod
    def absent(cls) -> str:
        return _package()[1]

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        package = _package()[0]
        q, k, v = (z.transpose(1, 2) for z in (inputs.q, inputs.k, inputs.v))
        out = package.flash_attn_func(q, k, v, softmax_scale=inputs.scale)
        return out.transpose(1, 2), None
