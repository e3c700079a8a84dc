"""xformers' memory-efficient attention. Its wheel loads kernels only beside the torch that it was built for."""

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
    """The operator module, or why it cannot be used."""
    if importlib.util.find_spec("xformers") is None:
        return None, "xformers is not installed (pip install xformers)"
    if not torch.cuda.is_available():
        return None, "xformers' kernels need a CUDA device, this machine shows none"
    try:
        ops = importlib.import_module("xformers.ops")
        extension = importlib.import_module("xformers._cpp_lib")
        loaded = extension._cpp_library_load_exception
    except Exception as error:  # built for another torch: fails at import in many ways
        return None, f"xformers does not import: {type(error).__name__}: {error}"
    if loaded is not None:
        return None, f"xformers' kernels were built for another torch: {str(loaded).splitlines()[0]}"
    return ops, ""


@dataclass(frozen=True, kw_only=True)
class XformersSpec(KernelSpec):
    """`xformers.ops.memory_efficient_attention`, token-major."""

    name: ClassVar[str] = "xformers"
    source: ClassVar[str] = "github.com/facebookresearch/xformers"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    head_dims: ClassVar[tuple[int, int]] = (8, 256)

    @classmethod
    def absent(cls) -> str:
        return _package()[1]

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        ops = _package()[0]
        q, k, v = (z.transpose(1, 2) for z in (inputs.q, inputs.k, inputs.v))
        return ops.memory_efficient_attention(q, k, v, scale=inputs.scale).transpose(1, 2), None
