"""Initial values as data, so that a model can be made one parameter at a time.

A module says how its own parameters start by ``initial_values() -> {name: Value}``; parameters that no module speaks for
start as torch starts them. `initial_tensor` makes one of them on the CPU in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float = 0.0


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Uniform in [-bound, bound]."""

    bound: float


@dataclass(frozen=True)
class Xavier:
    """Glorot uniform over the matrix (out, in…)."""


@dataclass(frozen=True)
class Centre:
    """A depthwise kernel that passes its input: 1 at the centre, 0 elsewhere."""


@dataclass(frozen=True)
class Identity:
    """A matrix with ones on its diagonal: it passes its input."""


@dataclass(frozen=True)
class Values:
    """These numbers, repeated along the first dimension as often as it is longer."""

    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Copy:
    """The value of a parameter of the host, by its kind of projection: ``q.weight``, ``k.bias`` …

    A host names the parameter behind it in ``projection_names``; `PlainHost` and `WanSelfAttention` show how.
    """

    source: str


Value = Constant | Normal | Uniform | Xavier | Centre | Identity | Values | Copy


def value_of(module: nn.Module, name: str) -> Value:
    """How parameter `name` of `module` (its own, not a child's) starts."""
    spoken = getattr(module, "initial_values", None)
    if spoken is not None and name in (values := spoken()):
        return values[name]  # type: ignore[no-any-return]
    marked = getattr(module, "ultrazoo_init", {})
    if name in marked:
        return marked[name]  # type: ignore[no-any-return]
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        fan_in = math.prod(module.weight.shape[1:])
        return Uniform(1 / math.sqrt(fan_in) if fan_in else 0.0)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return Constant(1.0 if name == "weight" else 0.0)
    if isinstance(module, nn.Embedding):
        return Normal(1.0)
    raise ValueError(f"{type(module).__name__} does not say how its parameter {name!r} starts (initial_values)")


def marked(module: nn.Module, **values: Value) -> nn.Module:
    """Give a torch module other initial values than its class's; returns the module."""
    module.ultrazoo_init = values  # type: ignore[assignment]
    return module


def initial_tensor(module: nn.Module, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The initial value of one parameter: fp32 on the CPU. `Copy` is the caller's business (ValueError here)."""
    return make(value_of(module, name), shape, generator)


def make(value: Value, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """An fp32 CPU tensor of `shape` that starts as `value` says."""
    shape = tuple(shape)
    match value:
        case Constant(number):
            return torch.full(shape, number, dtype=torch.float32)
        case Normal(std):
            return torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)
        case Uniform(bound):
            return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        case Xavier():
            bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
            return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        case Centre():
            tensor = torch.zeros(shape, dtype=torch.float32)
            tensor[(slice(None), slice(None), *(size // 2 for size in shape[2:]))] = 1.0
            return tensor
        case Identity():
            return torch.eye(*shape, dtype=torch.float32)
        case Values(numbers):
            row = torch.tensor(numbers, dtype=torch.float32)
            return row.repeat_interleave(shape[0] // len(numbers)).reshape(shape)
    raise ValueError(f"{value} has no value of its own")
