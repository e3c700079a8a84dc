"""FlexAttention (Dong et al., arXiv 2412.05496): block-sparse attention by a kernel that torch compiles for the lists of blocks.

The first call of a shape compiles, for about ten seconds on a CPU. There is no backward on a CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.blocks import block_valid, padded, unpadded
from ..ops.graphs import outside_graphs
from .block_map import BlockMap
from .door import Inputs, KernelSpec

LIST_ENTRIES = 1 << 25
"""Most entries of the table of lists (batch, heads, query blocks, key blocks) handed to the kernel at a time."""

COMPILED = 256
"""Most kinds and shapes of calls compiled in one process: past its own limit of eight, torch would run flex_attention as it is
written, which looks at no list."""


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def _no_compiler() -> str:
    """Why nothing can be compiled for a CPU here; empty where it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # inductor raises its own kinds for a missing or a wrong compiler
        return f"needs a C++ compiler: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


@dataclass(frozen=True, kw_only=True)
class FlexSpec(KernelSpec):
    """`torch.nn.attention.flex_attention`, compiled, on lists of key blocks."""

    name: ClassVar[str] = "flex"
    source: ClassVar[str] = "arXiv:2412.05496"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    head_dims: ClassVar[tuple[int, int]] = (16, 256)
    takes: ClassVar[frozenset[str]] = frozenset({"key_mask", "log_weight", "block_map", "lse"})
    needs: ClassVar[frozenset[str]] = frozenset({"block_map"})
    backend: ClassVar[str] = ""

    @classmethod
    def absent(cls) -> str:
        return "" if torch.cuda.is_available() else _no_compiler()

    @classmethod
    def reasons(cls, inputs: Inputs) -> list[str]:
        found = super().reasons(inputs)
        block_map: BlockMap | None = inputs.block_map
        if block_map is None:
            return found
        if inputs.needs_grad and inputs.q.device.type == "cpu":
            found.append("has no backward on a cpu")
        if inputs.return_lse and inputs.q.device.type == "cpu":
            found.append("does not return lse on a cpu")
        sizes = (block_map.queries.largest, block_map.keys.largest)
        if inputs.q.device.type == "cuda" and any(size % 16 for size in sizes):
            found.append(f"needs blocks that 16 divides on cuda, these are {sizes[0]} x {sizes[1]}")
        return found

    @classmethod
    @outside_graphs
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        block_map: BlockMap = inputs.block_map
        q, k, v = (
            padded(inputs.q, block_map.queries),
            padded(inputs.k, block_map.keys),
            padded(inputs.v, block_map.keys),
        )
        valid, weight = _validity(inputs), _weight(inputs)
        outs, lses = [], []
        for lo, hi in _row_ranges(block_map):
            mask = _block_mask(block_map, lo, hi, valid, inputs.needs_grad)
            out, lse = _call(
                cls.backend, q[:, :, lo:hi].flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), mask, weight, inputs
            )
            outs.append(out.unflatten(2, (hi - lo, -1)))
            lses += [] if lse is None else [lse.unflatten(2, (hi - lo, -1))]
        y = unpadded(torch.cat(outs, dim=2), block_map.queries)
        return y, unpadded(torch.cat(lses, dim=2), block_map.queries) if inputs.return_lse else None


@dataclass(frozen=True, kw_only=True)
class FlexFlashSpec(FlexSpec):
    """The same through its FLASH back end (FlashAttention-4, Hopper and later)."""

    name: ClassVar[str] = "flex_flash"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    takes: ClassVar[frozenset[str]] = frozenset({"block_map", "lse"})
    backend: ClassVar[str] = "FLASH"

    @classmethod
    def absent(cls) -> str:
        if not torch.cuda.is_available():
            return "the FLASH back end needs a CUDA device, this machine shows none"
        if torch.cuda.get_device_capability()[0] < 9:
            return f"the FLASH back end needs Hopper or later, this is {torch.cuda.get_device_name()}"
        from torch.nn.attention import flex_attention as module

        if not hasattr(module, "_Backend"):
            return f"torch {torch.__version__} has no FLASH back end for flex_attention"
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            return "the FLASH back end needs the package flash-attn-4 (pip install flash-attn-4)"
        return ""


def _row_ranges(block_map: BlockMap) -> list[tuple[int, int]]:
    """Ranges of query blocks, all of one length but the last, so that few shapes are compiled."""
    row = block_map.batch * block_map.heads * block_map.keys.count
    step = max(1, LIST_ENTRIES // row)
    return [(lo, min(lo + step, block_map.queries.count)) for lo in range(0, block_map.queries.count, step)]


def _validity(inputs: Inputs) -> Tensor | None:
    """(B | 1, heads | 1, key blocks, largest) bool of padded key slots, None where all are real."""
    blocks = inputs.block_map.keys
    slots = block_valid(blocks, inputs.k.device)
    if inputs.key_mask is None:
        return None if slots is None else slots[None, None]
    mask = padded(inputs.key_mask[:, :, 0], blocks)
    return mask if slots is None else mask & slots


def _weight(inputs: Inputs) -> Tensor | None:
    """(B, heads | 1, padded keys) to add to the scores, None where there is nothing."""
    if inputs.log_weight is None:
        return None
    batch = inputs.k.shape[0]
    return padded(inputs.log_weight[:, :, 0], inputs.block_map.keys).flatten(2).expand(batch, -1, -1).contiguous()


def _block_mask(block_map: BlockMap, lo: int, hi: int, valid: Tensor | None, learns: bool) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    chosen = block_map.rows(lo, hi)
    if valid is None:
        partial, full = torch.zeros_like(chosen), chosen
    else:
        whole = valid.all(-1)[:, :, None]
        partial, full = chosen & ~whole, chosen & whole
        partial, full = torch.broadcast_tensors(partial, full)
    size = (block_map.queries.largest, block_map.keys.largest)
    mask_mod = None
    if valid is not None:
        flat = valid.flatten(2)
        batched, per_head = flat.shape[0] > 1, flat.shape[1] > 1

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 - flex_attention's signature
            return flat[b if batched else 0, h if per_head else 0, j]

    return BlockMask.from_kv_blocks(
        *lists(partial),
        *lists(full),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=((hi - lo) * size[0], block_map.keys.count * size[1]),
        compute_q_blocks=learns,
    )


def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (B, heads, rows, blocks) → lengths (B, heads, rows) and the chosen indices first, ascending."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _call(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, weight: Tensor | None, inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    import torch._dynamo as dynamo
    from torch.nn.attention.flex_attention import AuxRequest

    score_mod = None
    if weight is not None:
        added = weight
        per_head = weight.shape[1] > 1

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 - its signature
            return score + added[b, h if per_head else 0, j]

    options: dict[str, Any] = {}
    if backend:
        options["BACKEND"] = backend
    elif q.device.type == "cuda":
        options = {"BLOCK_M": _power(mask.BLOCK_SIZE[0]), "BLOCK_N": min(64, _power(mask.BLOCK_SIZE[1]))}
    given: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": inputs.scale}
    if inputs.return_lse:
        given["return_aux"] = AuxRequest(lse=True)
    with dynamo.config.patch(recompile_limit=COMPILED, fail_on_recompile_limit_hit=True):
        found = _compiled()(q, k, v, kernel_options=options or None, **given)
    return (found[0], found[1].lse) if inputs.return_lse else (found, None)


def _power(size: int) -> int:
    """The largest power of two up to 128 that divides a block."""
    return min(128, size & -size)
