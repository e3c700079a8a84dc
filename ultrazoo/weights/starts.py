"""Initial values of a design's own parameters inside a model that is loaded, in whatever state its own are.

The host's parameters are read only where a design starts as a copy of them; what is read there has to be the whole truth about
the projection: plain numbers, no adapter beside them, none of them elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.contract import Attention
from ..errors import UsageError
from ..ops import init
from .copies import Held, copied
from .match import INSIDE
from .plain import require_plain
from .slots import attention_paths, seeded
from .tensors import PLAIN


def start_parameters(model: nn.Module, seed: int) -> int:
    """Give the attentions' own parameters inside `model` their initial values, dtype and device; returns their number.

    Each is seeded by (seed, its name in the model). Raises UsageError where a value is a copy of a host's parameter that
    is not a plain one (quantised, under a LoRA, on a disk), and for offloading that would lose parameters it never saw.
    """
    dtype, device = _kind(model)
    count = 0
    for path in attention_paths(model):
        block = model.get_submodule(path)
        for name, module in block.named_modules():
            for own, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                full = ".".join(part for part in (path, name, own) if part)
                value = init.value_of(module, own)
                if isinstance(value, init.Copy):
                    read = partial(_read, model, path.partition(INSIDE)[0], full)
                    made = copied(model, path, full, value, parameter.shape, read)
                else:
                    made = init.make(value, parameter.shape, seeded(seed, full))
                kind = dtype if made.is_floating_point() else made.dtype
                module._parameters[own] = nn.Parameter(made.to(device, kind), requires_grad=parameter.requires_grad)
                count += parameter.numel()
        block.to(device)
    if count:
        _refuse_streams(model)
    return count


def _kind(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of new parameters: those most of the model's floating-point parameters have.

    An offloaded model shows its parameters on the meta device; new ones wait in main memory and follow the data.
    """
    inside = tuple(f"{path}." for path in attention_paths(model))
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype in PLAIN and not name.startswith(inside):
            key = parameter.dtype, parameter.device
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    if not sizes:
        return torch.float32, torch.device("cpu")
    dtype, device = max(sizes, key=lambda key: sizes[key])
    if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in model.modules()):
        device = torch.device("cpu")
    return dtype, device


def _read(model: nn.Module, host: str, full: str, held: Held) -> Tensor | None:
    """The parameter of the host at the path `host` that `full` starts as a copy of, where it is a plain one."""
    why = f"the start of {full} as its copy (adapt: shared and lora read no weights)"
    with _present(model, held.module, held.path, why):
        if held.path != host:
            require_plain(held.module, held.path, why)
        found = getattr(held.module, held.name)
        return None if found is None else found.detach().clone()


@contextlib.contextmanager
def _present(model: nn.Module, linear: nn.Module, path: str, why: str) -> Iterator[None]:
    """`linear` with its parameters in memory, wherever accelerate or diffusers keep them. Raises UsageError for a disk that
    diffusers alone reads."""
    if any(getattr(group, "offload_to_disk_path", None) is not None for group in _groups(model)):
        raise UsageError(f"{path} is offloaded to disk: {why} needs its numbers; apply before enable_group_offload")
    if hasattr(linear, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(linear, torch.device("cpu")):
            yield
    else:
        yield


def _groups(model: nn.Module) -> list[Any]:
    """The groups of diffusers' group offloading inside `model`."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    hooks = [hook for registry in registries for hook in getattr(registry, "hooks", {}).values()]
    return [hook.group for hook in hooks if hasattr(hook, "group")]


def _refuse_streams(model: nn.Module) -> None:
    """Raise UsageError where group offloading by streams moves whole blocks: it copies only parameters it saw at its start."""
    for group in _groups(model):
        inside = (one for held in group.modules for one in held.modules())
        if group.stream is not None and any(isinstance(one, Attention) and list(one.parameters()) for one in inside):
            raise UsageError(
                "this model is offloaded in groups by streams, which know only the parameters they began with; "
                "apply first, then enable_group_offload, or use offload_type='leaf_level'"
            )
