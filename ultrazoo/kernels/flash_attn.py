"""FlashAttention 2, 3 and 4 (Dao, arXiv 2307.08691; Shah et al., 2407.08608), each a package of its own; used where installed.

Version 2 and 3 ship as source, version 4 is written in CuTe DSL. Log-sum-exp comes without gradients of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.blocks import Blocks
from .block_map import BlockMap
from .door import Inputs, KernelSpec

TILE = 128
"""Query and key blocks of version 4's lists."""


@lru_cache(maxsize=4)
def _package(module: str, install: str) -> tuple[Any, str]:
    """The module with `flash_attn_func`, or why it cannot be used."""
    name, how = install.split(" ", maxsplit=1)
    missing = f"{name} is not installed ({how})"
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None, missing
    try:
        package = importlib.import_module(module)
    except Exception as error:  # a build for another torch fails at import in many ways
        if isinstance(error, ModuleNotFoundError) and error.name and module.startswith(error.name):
            return None, missing
        return None, f"{module} does not import: {type(error).__name__}: {error}"
    # version 4 brings a folder flash_attn of its own, which imports as an empty package where version 2 is not
    if not hasattr(package, "flash_attn_func"):
        return None, f"{missing}: {module} is there without flash_attn_func"
    if not torch.cuda.is_available():
        return None, f"{module} needs a CUDA device, this machine shows none"
    return package, ""


@dataclass(frozen=True, kw_only=True)
class _Flash(KernelSpec):
    """What the versions share: token-major tensors, half precision, CUDA."""

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    head_dims: ClassVar[tuple[int, int]] = (8, 256)
    head_step: ClassVar[int] = 8
    takes: ClassVar[frozenset[str]] = frozenset({"lse"})
    module: ClassVar[str] = ""
    install: ClassVar[str] = ""
    capability: ClassVar[int] = 8

    @classmethod
    def absent(cls) -> str:
        why = _package(cls.module, cls.install)[1]
        if not why and torch.cuda.get_device_capability()[0] < cls.capability:
            return f"needs compute capability {cls.capability}.0 or later, this is {torch.cuda.get_device_name()}"
        return why

    @classmethod
    def reasons(cls, inputs: Inputs) -> list[str]:
        found = super().reasons(inputs)
        if inputs.return_lse and inputs.needs_grad:
            found.append("returns lse without gradients")
        return found

    @classmethod
    def call(cls, package: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Any:
        """The package's function on token-major tensors: the output, or a tuple of it and lse (B, heads, Lq)."""
        raise TypeError(f"{cls.__name__} calls nothing")

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        q, k, v = (z.transpose(1, 2) for z in (inputs.q, inputs.k, inputs.v))
        found = cls.call(_package(cls.module, cls.install)[0], q, k, v, inputs)
        out, lse = (found[0], found[1]) if isinstance(found, tuple) else (found, None)
        return out.transpose(1, 2), lse


@dataclass(frozen=True, kw_only=True)
class FlashAttnSpec(_Flash):
    """`flash_attn.flash_attn_func`."""

    name: ClassVar[str] = "flash_attn"
    source: ClassVar[str] = "arXiv:2307.08691"
    module: ClassVar[str] = "flash_attn"
    install: ClassVar[str] = "flash-attn pip install flash-attn; it compiles from source"

    @classmethod
    def call(cls, package: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Any:
        return package.flash_attn_func(q, k, v, softmax_scale=inputs.scale, return_attn_probs=inputs.return_lse)


@dataclass(frozen=True, kw_only=True)
class FlashAttn3Spec(_Flash):
    """`flash_attn_interface.flash_attn_func`, for Hopper."""

    name: ClassVar[str] = "flash_attn_3"
    source: ClassVar[str] = "arXiv:2407.08608"
    module: ClassVar[str] = "flash_attn_interface"
    install: ClassVar[str] = "flash-attn-3 install hopper/ of the flash-attention repository; it compiles from source"
    capability: ClassVar[int] = 9

    @classmethod
    def reasons(cls, inputs: Inputs) -> list[str]:
        found = super().reasons(inputs)
        if not cls.absent() and torch.cuda.get_device_capability(inputs.q.device)[0] != 9:
            found.append("runs on Hopper only")
        return found

    @classmethod
    def call(cls, package: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Any:
        # releases differ: some return lse always, some take a flag for it
        if not inputs.return_lse:
            return package.flash_attn_func(q, k, v, softmax_scale=inputs.scale)
        try:
            return package.flash_attn_func(q, k, v, softmax_scale=inputs.scale, return_attn_probs=True)
        except TypeError:
            return package.flash_attn_func(q, k, v, softmax_scale=inputs.scale)


@dataclass(frozen=True, kw_only=True)
class FlashAttn4Spec(_Flash):
    """`flash_attn.cute.flash_attn_func`, for Hopper and Blackwell; takes lists of key blocks."""

    name: ClassVar[str] = "flash_attn_4"
    source: ClassVar[str] = "github.com/Dao-AILab/flash-attention, flash_attn/cute"
    takes: ClassVar[frozenset[str]] = frozenset({"lse", "block_map"})
    module: ClassVar[str] = "flash_attn.cute.interface"
    install: ClassVar[str] = "flash-attn-4 pip install flash-attn-4"
    capability: ClassVar[int] = 9

    @classmethod
    def never(cls, passes: Collection[str], queries: Blocks | None = None, keys: Blocks | None = None) -> list[str]:
        found = super().never(passes, queries, keys)
        for which, blocks in (("query", queries), ("key", keys)):
            if blocks is not None and (not blocks.uniform or blocks.largest != TILE):
                found.append(f"takes {which} blocks of {TILE} tokens alone, {_sizes(blocks)}")
        return found

    @classmethod
    def reasons(cls, inputs: Inputs) -> list[str]:
        found = super().reasons(inputs)
        if inputs.block_map is not None and inputs.needs_grad:
            found.append("has no backward with a block map here")
        return found

    @classmethod
    def call(cls, package: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Any:
        options: dict[str, Any] = {"softmax_scale": inputs.scale}
        if inputs.return_lse:
            options["return_lse"] = True
        if inputs.block_map is not None:
            options["block_sparse_tensors"] = _block_lists(inputs.block_map)
        return package.flash_attn_func(q, k, v, **options)


def _sizes(blocks: Blocks) -> str:
    """Why blocks are not all of `TILE` tokens."""
    if blocks.short_end and blocks.largest == TILE:
        return f"the last of these is of {blocks.sizes[-1]}: {TILE} does not divide {blocks.tokens}"
    least = "" if blocks.uniform else f"{blocks.sizes.min()} to "
    return f"these are of {least}{blocks.largest}"


def _block_lists(block_map: BlockMap) -> Any:
    """The package's named tuple: every chosen block in full, none in part."""
    from .flex import lists

    sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    chosen = block_map.rows(0, block_map.queries.count)
    chosen = chosen.expand(block_map.batch, block_map.heads, -1, -1)
    counts, indices = lists(chosen)
    return sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
    )
