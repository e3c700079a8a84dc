"""How one axis is cut into windows, as runs: ``((count, size), …)`` of equal windows side by side.

The product of the runs of three axes is a set of dense rectangles: no mask and no padding at any size. Only integers
here; `partition` applies them to tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Runs = tuple[tuple[int, int], ...]


class Span(NamedTuple):
    """One run at its place on the axis: `count` windows of `size` tokens in [start, stop)."""

    start: int
    stop: int
    count: int
    size: int


@dataclass(frozen=True)
class AxisCut:
    """One axis, cut. `stride` 1: windows are contiguous; n > 1: window j holds tokens j, j+n, j+2n, …"""

    runs: Runs
    stride: int = 1

    @property
    def length(self) -> int:
        return sum(count * size for count, size in self.runs)

    @property
    def windows(self) -> int:
        return sum(count for count, _ in self.runs)

    @property
    def longest(self) -> int:
        return max(size for _, size in self.runs)

    @property
    def reach(self) -> int:
        """How many places the longest window spans."""
        return self.longest * (self.stride if self.longest > 1 else 1)

    @property
    def whole(self) -> bool:
        return self.windows == 1

    def sizes(self) -> Iterator[int]:
        """Size of every window in order."""
        for count, size in self.runs:
            yield from [size] * count

    def spans(self) -> list[Span]:
        """The runs with their place; for a strided axis, places on the reordered axis."""
        out, at = [], 0
        for count, size in self.runs:
            out.append(Span(at, at + count * size, count, size))
            at += count * size
        return out

    def order(self) -> list[int] | None:
        """The tokens of a strided axis, window by window; None where they are in order already."""
        if self.stride == 1:
            return None
        return [p for j in range(self.stride) for p in range(j, self.length, self.stride)]

    def window_of(self) -> list[int]:
        """Window index of every token."""
        if self.stride > 1:
            return [p % self.stride for p in range(self.length)]
        return [j for j, size in enumerate(self.sizes()) for _ in range(size)]

    def first(self) -> list[int]:
        """The first token of the window of every token."""
        if self.stride > 1:
            return [p % self.stride for p in range(self.length)]
        firsts, at = [], 0
        for size in self.sizes():
            firsts += [at] * size
            at += size
        return firsts

    def canonical(self) -> AxisCut:
        """The same windows in the simplest form, so that equal cuts compare equal."""
        if self.stride > 1 and self.longest == 1:
            return AxisCut(((self.length, 1),))
        return self


def merged(sizes: list[int]) -> Runs:
    """Runs of equal neighbours; windows of no token vanish."""
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if size == 0:
            continue
        if runs and runs[-1][1] == size:
            runs[-1] = (runs[-1][0] + 1, size)
        else:
            runs.append((1, size))
    return tuple(runs)


def in_parts(cut: AxisCut, most: int) -> AxisCut:
    """The same windows with no run of more than `most` of them."""
    runs: list[tuple[int, int]] = []
    for count, size in cut.runs:
        full, rest = divmod(count, most)
        runs += [(most, size)] * full + [(rest, size)] * (rest > 0)
    return AxisCut(tuple(runs), cut.stride)


def whole(length: int) -> AxisCut:
    return AxisCut(((1, length),))


def balanced(length: int, count: int) -> AxisCut:
    """`count` windows as equal as can be, longer ones first."""
    size, longer = length // count, length % count
    return AxisCut(merged([size + 1] * longer + [size] * (count - longer)))


def exact(length: int, size: int) -> AxisCut:
    """Windows of `size` tokens and a shorter last one."""
    full, rest = length // size, length % size
    return AxisCut(merged([size] * full + [rest]))


def strided(length: int, count: int) -> AxisCut:
    """`count` interleaved windows: the residue classes modulo `count`."""
    if count == 1:
        return whole(length)
    size, longer = length // count, length % count
    return AxisCut(merged([size + 1] * longer + [size] * (count - longer)), stride=count).canonical()


def rolled(cut: AxisCut, amount: int | None) -> AxisCut:
    """Swin's shifted windows without a roll: the borders move, the ends become windows of their own.

    With `amount`, every window border moves back by ``size - amount`` (the runs are amount, size, …, rest); with None,
    each border moves to the middle of its window. An axis that is one window stays as it is.
    """
    if cut.whole:
        return cut
    sizes = list(cut.sizes())
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    moves = [size // 2 if amount is None else min(amount, size) for size in sizes]
    borders = sorted({0, cut.length, *(start + move for start, move in zip(starts, moves, strict=True))})
    return AxisCut(merged([b - a for a, b in itertools.pairwise(borders)]))
