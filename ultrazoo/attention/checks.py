"""What a call must look like: shapes, dtypes and devices of everything that goes into an attention, told before it runs.

Nothing here computes. Sizes may be symbolic while a compiler or an exporter follows the code: then nothing is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops.graphs import followed

if TYPE_CHECKING:
    from ..spec import Site, Traits
    from .contract import Call, Extra


def shown(z: Any) -> str:
    """A tensor for an error message: ``float32 (2, 5, 8)``; anything else by its type."""
    if not isinstance(z, Tensor):
        return type(z).__name__
    return f"{str(z.dtype).removeprefix('torch.')} {tuple(z.shape)}"


def need_bool(name: str, mask: Any, sizes: str) -> None:
    """Raise UsageError for a mask that is not bool: added numbers and 0/1 integers would mean something else."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise UsageError(
            f"{name} is a bool tensor {sizes}, True where a token is real; got {shown(mask)}: "
            f"give mask.bool() for 0 and 1, or mask == 0 for numbers that are added to scores"
        )


def check_extra(extra: Extra) -> None:
    """Raise UsageError for extra tokens whose tensors, mask and segments do not belong together."""
    tensors = {"q": extra.q, "k": extra.k, "v": extra.v}
    said = ", ".join(f"{name} {shown(z)}" for name, z in tensors.items())
    if not all(isinstance(z, Tensor) and z.dim() == 4 for z in tensors.values()):
        raise UsageError(f"q, k and v of extra tokens are (B, M, heads, D), normed, rotated and split; got {said}")
    # rows of queries may be picked out; everything else agrees
    if extra.k.shape != extra.v.shape or (extra.q.shape[0], extra.q.shape[2:]) != (extra.k.shape[0], extra.k.shape[2:]):
        raise UsageError(f"q, k and v of extra tokens have one shape (B, M, heads, D); got {said}")
    if not extra.q.dtype == extra.k.dtype == extra.v.dtype and not torch.is_autocast_enabled(extra.k.device.type):
        raise UsageError(f"q, k and v of extra tokens have one dtype; got {said}: convert them with .to(dtype)")
    batch, count = extra.k.shape[:2]
    if extra.key_mask is not None:
        need_bool("key_mask of extra tokens", extra.key_mask, f"(B, M) = ({batch}, {count})")
        if tuple(extra.key_mask.shape) != (batch, count):
            raise UsageError(
                f"key_mask of extra tokens is (B, M) = ({batch}, {count}), got {tuple(extra.key_mask.shape)}; samples with "
                f"fewer tokens are padded to M and False there"
            )
    told = sum(segment.length for segment in extra.segments)
    if extra.segments and told != count:
        lengths = " + ".join(f"{segment.kind} {segment.length}" for segment in extra.segments)
        raise UsageError(
            f"segments describe all {count} extra tokens in order, these add up to {told} ({lengths}); "
            f"samples with fewer tokens are padded, with key_mask False there"
        )


def check_call(call: Call) -> None:
    """Raise UsageError for a grid or a step that is none, and for a mask or a timestep of the wrong kind."""
    grid = call.grid
    if len(grid) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid):
        raise UsageError(f"a call's grid is (T, H, W), three positive integers (an image has T = 1), got {tuple(grid)}")
    if call.key_valid is not None:
        need_bool("key_valid", call.key_valid, "(B, N)")
    if call.timestep is not None and (not isinstance(call.timestep, Tensor) or call.timestep.dim() not in (1, 2)):
        raise UsageError(
            f"a timestep is a tensor (B,), (B, T) or (B, N) on the 0..1000 scale, got {shown(call.timestep)}"
        )
    if call.step is not None and not _is_step(call.step):
        raise UsageError(f"a step is (index, count), two integers with 0 <= index < count, got {call.step!r}")


def _is_step(step: Any) -> bool:
    if not isinstance(step, tuple | list) or len(step) != 2:
        return False
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in step):
        return False
    return bool(0 <= step[0] < step[1])


def check_inputs(name: str, site: Site, x: Tensor, call: Call) -> None:
    """Raise UsageError for hidden states that do not fit the call, or a call that does not fit them."""
    t, h, w = call.grid
    tokens = t * h * w
    if not isinstance(x, Tensor):
        raise UsageError(f"attention {name!r}: x is a tensor (B, N, C), got {shown(x)}: torch.as_tensor(x) makes one")
    # what the channels must be is the host's to say
    if x.dim() != 3 or x.shape[1] != tokens:
        raise UsageError(
            f"attention {name!r}: x is (B, N, C) with N = {tokens} for grid ({t}, {h}, {w}), got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise UsageError(f"attention {name!r}: x holds floating point numbers, got {shown(x)}")
    batch = x.shape[0]
    if batch == 0:
        raise UsageError(f"attention {name!r}: x has no samples {tuple(x.shape)}; a batch is at least 1")
    if call.key_valid is not None and tuple(call.key_valid.shape) != (batch, tokens):
        raise UsageError(
            f"attention {name!r}: key_valid is (B, N) = ({batch}, {tokens}), got {tuple(call.key_valid.shape)}"
        )
    if call.timestep is not None:
        sizes = tuple(call.timestep.shape)
        if sizes[0] not in (1, batch) or (len(sizes) == 2 and sizes[1] not in (1, t, tokens)):
            raise UsageError(
                f"attention {name!r}: a timestep is (B,), (B, T) or (B, N) with B = {batch}, T = {t}, N = {tokens}; got {sizes}"
            )
    extra = call.extra
    if extra is None:
        return
    wanted = (batch, extra.k.shape[1], site.heads, site.head_dim)
    for which, z in (("q", extra.q), ("k", extra.k)):
        if tuple(z.shape) != wanted:
            raise UsageError(
                f"attention {name!r}: {which} of extra tokens is (B, M, heads, D) = {wanted}, got {tuple(z.shape)}"
            )
    if extra.k.device != x.device:
        raise UsageError(f"attention {name!r}: x is on {x.device}, extra tokens are on {extra.k.device}; move one")


def check_wanted(name: str, traits: Traits, call: Call) -> None:
    """Raise UsageError for a call without what a design needs, or with what it cannot take."""
    if "timestep" in traits.needs and call.timestep is None:
        raise UsageError(
            f"attention {name!r} needs the timestep of every call: give timestep (B,) on the 0..1000 scale"
        )
    why = f": {traits.notes}" if traits.notes else ""
    if call.key_valid is not None and not traits.key_valid:
        raise UsageError(f"attention {name!r} takes no padded grid tokens (key_valid){why}")
    if call.extra is not None and not traits.extra:
        raise UsageError(f"attention {name!r} takes no extra tokens{why}")


def same_dtype(extra: Extra, k: Tensor) -> None:
    """Raise UsageError for extra tokens of another dtype than the grid's keys, or what makes them: joined, one of the two
    would be widened unseen."""
    if followed() or extra.k.dtype == k.dtype or torch.is_autocast_enabled(k.device.type):
        return
    got, own = (str(z.dtype).removeprefix("torch.") for z in (extra.k, k))
    raise UsageError(f"extra tokens are {got}, keys of the grid {own}: give both in one dtype, or run under autocast")
