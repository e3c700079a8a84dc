"""The sizes of an exported model: which axes are open and between which bounds, inputs at a size, sizes for the proof.

Axes: ``b`` batch, ``t h w`` the token grid, ``text`` text tokens. An image (T = 1) and a video (T at least 2) are two
exports, for an exporter takes a size of 1 for a constant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, near
from ..grid import Grid
from ..ops.seeds import generator_for
from ..ports import Port

AXES = ("b", "t", "h", "w", "text")
HIGHEST = {"b": 64, "t": 1024, "h": 4096, "w": 4096, "text": 4096}
"""Upper bounds of open axes. Positions are exact in fp32 far beyond; products of sizes stay within 64 bits."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Axis:
    """One axis: its name and the sizes that are allowed, both ends included; fixed where they are equal."""

    name: str
    low: int
    high: int

    @property
    def open(self) -> bool:
        return self.low < self.high

    def data(self) -> list[int]:
        return [self.low, self.high]


Bounds = Mapping[str, Axis]


def axes_of(ports: Sequence[Port]) -> tuple[str, ...]:
    """The axes that occur in a model's inputs, in the order of `AXES`."""
    found = {one[0] for port in ports for one in port.shape if isinstance(one, tuple)}
    return tuple(axis for axis in AXES if axis in found)


def bounds_of(
    ports: Sequence[Port], grid: Grid, lowest: tuple[int, int, int], text: int, opened: Collection[str] | None
) -> dict[str, Axis]:
    """The axes of a model with their bounds.

    `lowest` is the smallest grid that the attentions allow, `opened` the axes to leave open, all where None. What is not
    open has the size of the recipe; the batch is 1. Raises UsageError for an axis that the model does not have.
    """
    known = axes_of(ports)
    if opened is not None and "t" in opened and grid.t == 1:
        raise UsageError("--dynamic t: this recipe makes images (T = 1); an image and a video are two exports")
    for axis in opened or ():
        if axis not in known:
            hint = near(axis, known)
            rule = f"--dynamic names axes of {', '.join(known)}, got {axis!r}"
            raise UsageError(rule + (f"; {hint}" if hint else ""))
    least = {"b": 1, "t": max(2, lowest[0]), "h": max(2, lowest[1]), "w": max(2, lowest[2]), "text": 2}
    fixed = {"b": 1, "t": grid.t, "h": grid.h, "w": grid.w, "text": text}
    found = {}
    for axis in known:
        is_open = (opened is None or axis in opened) and not (axis == "t" and grid.t == 1)
        low, high = (least[axis], HIGHEST[axis]) if is_open else (fixed[axis], fixed[axis])
        found[axis] = Axis(axis, low, high)
    return found


def proof_sizes(bounds: Bounds) -> list[dict[str, int]]:
    """The sizes to compare at; the first is the one to trace at, with a batch of 2.

    Then twice the lowest bounds, where windows by number divide evenly; a ragged size, of three different primes, which no
    window and no cell divides; and both ends of the batch exchanged.
    """
    more = {"b": 1, "t": 1, "h": 1, "w": 2, "text": 5}

    def at(wanted: Mapping[str, int]) -> dict[str, int]:
        return {axis: min(wanted[axis], one.high) if one.open else one.low for axis, one in bounds.items()}

    traced = at({axis: one.low + more[axis] for axis, one in bounds.items()})
    even = at({axis: 1 if axis == "b" else 2 * one.low for axis, one in bounds.items()})
    odd = at({axis: one.low + more[axis] + 6 for axis, one in bounds.items()} | {"b": 2} | _primes(bounds))
    single = at({**traced, "b": 1})
    found: list[dict[str, int]] = []
    for size in (traced, even, odd, single):
        if size not in found:
            found.append(size)
    return found


def _primes(bounds: Bounds) -> dict[str, int]:
    """A prime for each axis of the grid, a little above its lowest size, all different."""
    found: dict[str, int] = {}
    for axis in ("t", "h", "w"):
        if axis in bounds:
            size = bounds[axis].low + 2
            while size in found.values() or any(size % divisor == 0 for divisor in range(2, size)):
                size += 1
            found[axis] = size
    return found


def inputs_at(ports: Sequence[Port], sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a forward at a size, from `seed` alone: noise in `dtype`, timesteps in fp32 that differ in the batch."""
    found = {}
    for port in ports:
        shape = [one if isinstance(one, int) else sizes[one[0]] * one[1] for one in port.shape]
        generator = generator_for(seed, port.name)
        if port.kind == "timestep":
            # both ends of the scale and what lies between
            value = (torch.rand(shape, generator=generator) + torch.arange(shape[0])) / max(1, shape[0]) * 999
        elif port.kind == "label":
            value = torch.randint(port.below, shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator).to(dtype)
        found[port.name] = value
    return found


def sizes_of(ports: Sequence[Port], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The size that inputs have. Raises UsageError where they are no inputs of these ports, or disagree."""
    found: dict[str, int] = {}
    for port in ports:
        if port.name not in inputs:
            raise UsageError(f"input {port.name} is missing; inputs are {', '.join(one.name for one in ports)}")
        shape = tuple(inputs[port.name].shape)
        due = ", ".join(str(one) if isinstance(one, int) else _times(one) for one in port.shape)
        if len(shape) != len(port.shape):
            raise UsageError(f"{port.name} has shape {shape}; it is ({due})")
        for got, one in zip(shape, port.shape, strict=True):
            if isinstance(one, int):
                if got != one:
                    raise UsageError(f"{port.name} has shape {shape}; it is ({due})")
                continue
            axis, factor = one
            if got % factor or found.setdefault(axis, got // factor) != got // factor:
                raise UsageError(f"{port.name} has shape {shape}; it is ({due}) with {axis} as in the other inputs")
    return found


def _times(one: tuple[str, int]) -> str:
    return one[0] if one[1] == 1 else f"{one[1]}*{one[0]}"


def require_within(bounds: Bounds, sizes: Sizes, where: str) -> None:
    """Raise UsageError for sizes outside the bounds, all of them at once."""
    wrong = [
        f"{axis} = {sizes[axis]} (allowed {bound.low}" + (f" to {bound.high})" if bound.open else ")")
        for axis, bound in bounds.items()
        if not bound.low <= sizes[axis] <= bound.high
    ]
    if wrong:
        raise UsageError(f"{where} was not exported for {'; '.join(wrong)}; export again with other sizes")


def bounds_from(data: Any) -> dict[str, Axis]:
    """Bounds as `Axis.data` wrote them."""
    return {name: Axis(name, *ends) for name, ends in data.items()}
