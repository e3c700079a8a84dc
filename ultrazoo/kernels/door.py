"""One function computes softmax(QKᵀ)V, whatever kernel runs it.

A kernel is a registered part that states its facts (devices, dtypes, head sizes, what it takes) and says why it cannot
run given inputs. ``auto`` takes the first exact kernel of a fixed order that can; a forced kernel that cannot run raises
with every candidate's reasons; lossy kernels run only by name. `record` shows what ran.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import registry, tuned
from ..errors import KernelError, UsageError
from ..ops.blocks import Blocks
from ..ops.graphs import followed
from ..spec import Spec

PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cuda": ("flash_attn_4", "flash_attn_3", "flash_attn", "sdpa", "math", "by_key", "flex", "gathered"),
    # on a CPU a kernel that compiles for ten seconds is not a choice to make for somebody
    "cpu": ("sdpa", "math", "by_key", "gathered"),
}
"""Order in which ``auto`` asks the built-in exact kernels, per kind of device; measured orders (`tuned`) come first."""
ELSEWHERE = ("sdpa", "math", "by_key", "gathered")


def measured_key(inputs: Inputs) -> str:
    """What a measured order for these inputs is kept under."""
    device = torch.cuda.get_device_name(inputs.q.device) if inputs.q.device.type == "cuda" else _cpu()
    dtype = str(inputs.q.dtype).removeprefix("torch.")
    call = "dense"
    if inputs.block_map is not None:
        call = "blocks" if inputs.block_map.queries.largest > 1 else "blocks of single queries"
    return tuned.key(device, torch.__version__, dtype, inputs.q.shape[-1], call)


@lru_cache(maxsize=1)
def _cpu() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def preference(inputs: Inputs) -> tuple[str, ...]:
    """The kernels that ``auto`` asks for these inputs, in order: measured ones first where there are any."""
    fixed = PREFERENCE.get(inputs.q.device.type, ELSEWHERE)
    measured = tuned.order_of(measured_key(inputs))
    return (*measured, *(name for name in fixed if name not in measured))


OPTIONAL = ("key_mask", "bias", "log_weight", "block_map", "threshold")
REFUSALS = {name: f"takes no {name}" for name in OPTIONAL} | {
    "lse": "does not return lse",
    "unequal": "needs equal head sizes of q and v",
}
NEEDS = {"block_map": "is for block maps only", "threshold": "needs a threshold"}


@dataclass(frozen=True)
class Inputs:
    """One call, as kernels see it: q (B, heads, Lq, D), k and v (B, heads, Lk, D or Dv), masks and weights in four dimensions
    however few they came with.

    Raises UsageError for tensors and blocks that do not fit each other, and for a key_mask that is not bool.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    log_weight: Tensor | None = None
    block_map: Any = None
    scale: float | None = None
    return_lse: bool = False
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not followed():
            for rule in _misfits(self):
                raise UsageError(f"attention kernels: {rule} ({self})")
        for name in ("key_mask", "bias", "log_weight"):
            z = getattr(self, name)
            if z is not None and z.dim() < 4:
                object.__setattr__(self, name, z := z[(None,) * (4 - z.dim())])
            # lists of blocks pick keys out; in graphs there are none
            if z is not None and not followed() and z.shape[-1] != self.k.shape[2]:
                object.__setattr__(self, name, z.expand(*z.shape[:3], self.k.shape[2]))

    @property
    def passes(self) -> frozenset[str]:
        """What is given beside q, k and v, and asked for beside the output, in the words of `KernelSpec.takes`."""
        given = {name for name in OPTIONAL if getattr(self, name) is not None}
        asked = {"lse": self.return_lse, "unequal": self.v.shape[-1] != self.q.shape[-1]}
        return frozenset(given | {name for name, wanted in asked.items() if wanted})

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(z.requires_grad for z in (self.q, self.k, self.v))

    @property
    def pairs(self) -> int:
        """Query-key pairs visited, over batch and heads."""
        if self.block_map is not None:
            return int(self.block_map.pairs(self.q.shape[0], self.q.shape[1]))
        return math.prod(self.q.shape[:-1]) * self.k.shape[-2]

    def __str__(self) -> str:
        parts = [f"q {tuple(self.q.shape)}", f"k {tuple(self.k.shape)}", f"v {tuple(self.v.shape)}"]
        parts += [str(self.q.dtype).removeprefix("torch."), str(self.q.device)]
        for name in ("key_mask", "bias", "log_weight", "block_map"):
            if getattr(self, name) is not None:
                parts.append(f"with {name}")
        if self.return_lse:
            parts.append("returning lse")
        return ", ".join(parts)


def _misfits(inputs: Inputs) -> Iterator[str]:
    """What is wrong with the shapes, masks and devices of a call, whichever kernel runs it; dtypes are a kernel's affair."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if not q.dim() == k.dim() == v.dim() == 4:
        yield "q is (B, heads, Lq, D), k (B, heads, Lk, D), v (B, heads, Lk, Dv)"
        return
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        yield "q, k and v have the same batch and heads, k and v as many tokens; repeat keys of grouped heads first"
    if q.shape[-1] != k.shape[-1]:
        yield "q and k have the same head size"
    if 0 in (*q.shape, *k.shape):
        yield "none of batch, heads, tokens and head size may be 0"
    whole = (*q.shape[:3], k.shape[2])
    for name in ("key_mask", "bias", "log_weight"):
        z = getattr(inputs, name)
        if z is None:
            continue
        # a mask and a weight are of keys, the same for every query
        allowed = whole if name == "bias" else (*whole[:2], 1, whole[3])
        sizes = (1,) * (4 - z.dim()) + tuple(z.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, allowed, strict=True)):
            yield f"{name} broadcasts to {allowed}, it is {tuple(z.shape)}"
        if name == "key_mask" and z.dtype != torch.bool:
            yield f"key_mask is bool, True where a key takes part, it is {z.dtype}; numbers that are added are a bias"
        if z.device != q.device:
            yield f"{name} is on {z.device}, q on {q.device}"
    if inputs.block_map is not None:
        for which, blocks, z in (("q", inputs.block_map.queries, q), ("k", inputs.block_map.keys, k)):
            if blocks.tokens != z.shape[2]:
                yield f"blocks of {which} hold its {z.shape[2]} tokens, those of block_map hold {blocks.tokens}"
    if not q.device == k.device == v.device:
        yield f"q, k and v are on one device, they are on {q.device}, {k.device}, {v.device}"


@dataclass(frozen=True, kw_only=True)
class KernelSpec(Spec):
    """Facts of one kernel, and the kernel.

    `takes` lists what it accepts beside q, k, v: ``key_mask``, ``bias``, ``log_weight``, ``block_map``, ``threshold``,
    ``lse``, ``unequal`` (value channels other than D); `needs` what it cannot do without. Subclasses add `absent` and `run`.
    """

    kind: ClassVar[str] = "kernel"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    head_dims: ClassVar[tuple[int, int]] = (1, 1 << 16)
    head_step: ClassVar[int] = 1
    takes: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    backward: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    @classmethod
    def absent(cls) -> str:
        """Why this kernel is not on this machine; empty when it is."""
        return ""

    @classmethod
    def never(cls, passes: Collection[str], queries: Blocks | None = None, keys: Blocks | None = None) -> list[str]:
        """Why this kernel runs on no machine for a design that passes it these inputs (words of `takes`), and these blocks
        of queries and keys where it passes a map of them; empty when it may run."""
        found = [REFUSALS[name] for name in REFUSALS if name in passes and name not in cls.takes]
        return found + [NEEDS[name] for name in NEEDS if name in cls.needs and name not in passes]

    @classmethod
    def wrong_head(cls, size: int) -> str:
        """Why this kernel takes no heads of so many channels; empty where it does."""
        (low, high), step = cls.head_dims, cls.head_step
        if not low <= size <= high:
            return f"head size {size} is outside {low}-{high}"
        return f"needs a head size that {step} divides, got {size}" if size % step else ""

    @classmethod
    def reasons(cls, inputs: Inputs) -> list[str]:
        """Everything that keeps this kernel from running `inputs`; empty when it can."""
        found = [cls.absent()] if cls.absent() else []
        if inputs.q.device.type not in cls.devices:
            found.append(f"runs on {'/'.join(cls.devices)}, inputs are on {inputs.q.device.type}")
        if inputs.q.dtype not in cls.dtypes:
            found.append(f"does not take {str(inputs.q.dtype).removeprefix('torch.')}")
        if not inputs.q.dtype == inputs.k.dtype == inputs.v.dtype:
            kinds = ", ".join(str(z.dtype).removeprefix("torch.") for z in (inputs.q, inputs.k, inputs.v))
            found.append(f"needs q, k and v of one dtype, they are {kinds}")
        if why := cls.wrong_head(inputs.q.shape[-1]):
            found.append(why)
        block_map = inputs.block_map
        blocks = (None, None) if block_map is None else (block_map.queries, block_map.keys)
        found += cls.never(inputs.passes, *blocks)
        if inputs.needs_grad and not cls.backward:
            found.append("has no backward")
        if followed() and not cls.exportable:
            found.append("does not export")
        return found

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Output (B, heads, Lq, Dv) and, where asked, log-sum-exp (B, heads, Lq) in fp32 or wider."""
        raise TypeError(f"{cls.__name__} has no kernel")


@dataclass(frozen=True)
class Run:
    """One call that went through the door: the kernel, the shapes of q and k, the query-key pairs visited over batch and
    heads, and whether it followed lists of blocks."""

    kernel: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    pairs: int
    blocks: bool = False


_TARGET: contextvars.ContextVar[str] = contextvars.ContextVar("ultrazoo_kernel_target", default="")


@contextlib.contextmanager
def exporting_to(target: str) -> Iterator[None]:
    """Inside the ``with`` block, graphs are made for this export target: what it cannot hold is written otherwise."""
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> str:
    """The export target that a graph is being made for; empty when none is."""
    return _TARGET.get()


Watch = Callable[[str, Inputs], None]
"""Called with the kernel's name and the inputs of a call, before the kernel runs."""

_WATCHES: contextvars.ContextVar[tuple[Watch, ...]] = contextvars.ContextVar("ultrazoo_kernel_watches", default=())


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Show every call through the door inside the ``with`` block to `watch`, tensors and block map included."""
    token = _WATCHES.set((*_WATCHES.get(), watch))
    try:
        yield
    finally:
        _WATCHES.reset(token)


@contextlib.contextmanager
def record() -> Iterator[list[Run]]:
    """Collect every call through the door inside the ``with`` block, in order."""
    runs: list[Run] = []

    def keep(name: str, inputs: Inputs) -> None:
        q, k = tuple(inputs.q.shape), tuple(inputs.k.shape)
        runs.append(Run(name, q, k, inputs.pairs, inputs.block_map is not None))

    with watched(keep):
        yield runs


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    log_weight: Tensor | None = None,
    block_map: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    threshold: float | None = None,
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(QKᵀ·scale)V on q (B, heads, Lq, D), k (B, heads, Lk, D), v (B, heads, Lk, Dv) → (B, heads, Lq, Dv).

    key_mask (B, 1 | heads, 1, Lk) bool: True where a key takes part (nearly free). bias broadcastable to (B, heads, Lq, Lk),
    added to the scores (costs the fused path). log_weight (B, 1 | heads, 1, Lk): added to every score of a key.
    block_map: key blocks that each query block visits. scale: None means D**-0.5. return_lse: also the log-sum-exp of
    the scores (B, heads, Lq), differentiable. threshold: for lossy kernels that skip by it. kernel: a registered name, or
    ``auto``.

    Raises KernelError with every candidate's reasons when nothing can run, or when a forced kernel cannot.
    """
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(q.device.type):
        # autocast leaves norms in fp32 and projections in 16 bits, and takes attention for a matmul
        q, k, v = (z.to(torch.get_autocast_dtype(q.device.type)) for z in (q, k, v))
    inputs = Inputs(q, k, v, key_mask, bias, log_weight, block_map, scale, return_lse, threshold)
    name, spec = _choose(inputs, kernel)
    if not followed():
        for watch in _WATCHES.get():
            watch(name, inputs)
    out, lse = spec.run(inputs)
    if not return_lse:
        return out
    if lse is None:
        raise KernelError(f"kernel {name!r} returned no lse")
    return out, lse


def _choose(inputs: Inputs, kernel: str) -> tuple[str, type[KernelSpec]]:
    if kernel == "auto" and followed():
        # a compiler follows this code: decide without a look at the registry
        from .math import MathSpec
        from .sdpa import SdpaSpec

        return ("math", MathSpec) if inputs.return_lse else ("sdpa", SdpaSpec)
    if kernel == "auto":
        refused = {}
        for name in preference(inputs):
            spec = registry.find("kernel", name)
            why = spec.reasons(inputs)
            if not why:
                return name, spec
            refused[name] = why
        raise KernelError(_explain("no kernel can run these inputs", inputs, refused))
    spec = registry.find("kernel", kernel)
    why = spec.reasons(inputs)
    if why:
        refused = {kernel: why}
        for name in preference(inputs):
            refused.setdefault(name, registry.find("kernel", name).reasons(inputs))
        raise KernelError(_explain(f"kernel {kernel!r} was asked for and cannot run", inputs, refused))
    return spec.name, spec


def _explain(title: str, inputs: Inputs, refused: dict[str, Sequence[str]]) -> str:
    lines = [f"{title} ({inputs}):"]
    lines += [f"  {name}: {'; '.join(why) or 'can run'}" for name, why in refused.items()]
    return "\n".join(lines)
