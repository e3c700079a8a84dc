"""What a script holds inside while it runs: there is no graph with sizes to read, so it is run and watched at two sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ports import Port
from .interior import SQUARE, Inside, Interior
from .sizes import Bounds, Sizes, inputs_at

SIDE = 4
"""Height and width from which doubling tells growth."""


@dataclass(frozen=True)
class _Seen:
    operator: str
    shape: tuple[int, ...]
    itemsize: int
    scores: tuple[int, ...] | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class _Watch(TorchDispatchMode):
    """Keep the largest result of every operator, in the order in which they run, and the scores of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        values = [one for one in (found if isinstance(found, list | tuple) else [found]) if isinstance(one, Tensor)]
        if values:
            largest = max(values, key=lambda one: one.numel())
            name = str(func.overloadpacket).removeprefix("aten.")
            scores = None
            if "scaled_dot_product" in name:
                scores = (*args[0].shape[:3], args[1].shape[2])
            self.seen.append(_Seen(name, tuple(largest.shape), largest.element_size(), scores))
        return found


def measured(
    module: Any, ports: Sequence[Port], bounds: Bounds, dtype: torch.dtype, device: torch.device
) -> tuple[Interior, dict[str, int]]:
    """Run a script at two small sizes; returns what is inside and the larger size, whose bytes they are.

    Where the grid is fixed there is one size, that of the recipe, and nothing grows.
    """
    small = {axis: max(one.low, SIDE) if one.open and axis in "hw" else one.low for axis, one in bounds.items()}
    growing = [axis for axis in "thw" if axis in bounds and bounds[axis].open]
    large = {axis: min(2 * size, bounds[axis].high) if axis in growing else size for axis, size in small.items()}
    runs = [_run(module, ports, at, dtype, device) for at in ((small, large) if growing else (large,))]
    first, last = runs[0], runs[-1]
    # an interpreter without optimisation runs the same operators at every size
    assert [one.operator for one in first] == [one.operator for one in last]
    tokens = math.prod(large[axis] / small[axis] for axis in growing)
    largest = max(last, key=lambda one: one.count * one.itemsize)
    square = [b for a, b in zip(first, last, strict=True) if b.count > a.count * tokens * SQUARE]
    worst = max(square, key=lambda one: one.count * one.itemsize, default=None)
    attended = max((one for one in last if one.scores), key=lambda one: math.prod(one.scores or ()), default=None)
    scores = None
    if attended is not None and attended.scores is not None:
        held = math.prod(attended.scores) * attended.itemsize
        scores = Inside(attended.operator, str(attended.scores), held)
    return Interior({}, _inside(largest), None if worst is None else _inside(worst), scores), large


def _run(module: Any, ports: Sequence[Port], at: Sizes, dtype: torch.dtype, device: torch.device) -> list[_Seen]:
    inputs = inputs_at(ports, at, dtype)
    placed = [inputs[port.name].to(device) for port in ports]
    with torch.no_grad(), torch.jit.optimized_execution(False), _Watch() as watch:
        module(*placed)
    return watch.seen


def _inside(one: _Seen) -> Inside:
    return Inside(one.operator, str(one.shape), one.count * one.itemsize)
