"""Which frames a chunk of frames sees: integers only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """Queries of frames [first, last) see the frames [0, sinks) and [low, high)."""

    first: int
    last: int
    sinks: int
    low: int
    high: int

    @property
    def frames(self) -> int:
        """How many frames the queries see."""
        return self.sinks + self.high - self.low

    def sees(self, frame: int) -> bool:
        return frame < self.sinks or self.low <= frame < self.high


def spans(frames: int, chunk: int, window: int, sinks: int, ahead: int) -> Iterator[Span]:
    """The chunks of `frames` frames in order; the last one is as short as it must be.

    A sink is seen once it lies in the past or inside the window: a chunk sees nothing beyond its end plus `ahead`. Where
    the window reaches the sinks both become one run from frame 0, so that no frame counts twice.
    """
    for first in range(0, frames, chunk):
        last = min(first + chunk, frames)
        low, high = max(0, first - window), min(frames, last + ahead)
        if low <= sinks:
            yield Span(first, last, 0, 0, high)
        else:
            yield Span(first, last, sinks, low, high)
