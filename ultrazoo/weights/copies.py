"""Parameters of a design that start as copies of the host's projections: whose numbers they take, and which part of them.

A host of our own names its projections (``projection_names``); in a model of another library the processor around the
attention knows where the model keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.adapter import Part
from ..errors import UltrazooError, UsageError
from ..ops.init import Copy
from .match import INSIDE


class Held(NamedTuple):
    """Parameter `name` of `module`, whose path in the model is `path`."""

    path: str
    module: nn.Module
    name: str


def copied(
    model: nn.Module,
    attention: str,
    full: str,
    value: Copy,
    shape: tuple[int, ...],
    read: Callable[[Held], Tensor | None],
) -> Tensor:
    """What the parameter `full` of the attention at the path `attention` starts as, of `shape`.

    `read` gives the host's parameter whole, None where there is none: a projection without bias is copied as zeros. Raises
    UsageError where the host has no such projection, or one of other sizes.
    """
    host, part = _source(model, attention, full, value.source)
    if part.place is None:
        # what the host hands on as it is, the copy hands on
        return torch.eye(*shape) if len(shape) > 1 else torch.zeros(shape)
    below, _, name = part.place.rpartition(".")
    path = ".".join(step for step in (host, below) if step)
    found = read(Held(path, model.get_submodule(path), name))
    if found is None:
        return torch.zeros(shape)
    found = part.of(found)
    if tuple(found.shape) != tuple(shape):
        raise UsageError(f"{host}.{part.place} is {tuple(found.shape)}, {full} {tuple(shape)}: it cannot be a copy")
    return found


def _source(model: nn.Module, attention: str, full: str, source: str) -> tuple[str, Part]:
    """Module path of the host beside `attention`, and the part of it that `source` (``q.weight`` …) names."""
    if INSIDE in f"{attention}.":
        at = attention.partition(INSIDE)[0]
        host: Any = model.get_submodule(at)
        which, _, part = source.partition(".")
        return at, host.processor.parameter(host, which, part)
    block = attention.rpartition(".")[0]
    hosts: list[tuple[str, Any]] = [
        (name, child)
        for name, child in model.get_submodule(block).named_children()
        if source in getattr(child, "projection_names", {})
    ]
    if len(hosts) != 1:
        raise UltrazooError(f"{full} starts as the host's {source!r}, and no host beside it has that")
    name, host = hosts[0]
    return ".".join(step for step in (block, name) if step), Part(host.projection_names[source])
