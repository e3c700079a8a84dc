"""Windows over whole frames: chunks of frames that see the chunks around them, with anchor frames seen by and seeing all.

Only integers here. Frame t is in chunk ``t // chunk`` and sees the frames of chunks within `radius` of it; the first and
the last frame may be anchors, dense as rows and as columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Range = tuple[int, int]
"""Frames [start, stop)."""


class Rows(NamedTuple):
    """Frames whose tokens see the same frames: ranges of queries and of keys, in order and apart from each other."""

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]


class Window(NamedTuple):
    """The frames [start, stop) of one chunk that are no anchors, and the frames [low, high) that their window holds."""

    start: int
    stop: int
    low: int
    high: int


def count(ranges: tuple[Range, ...]) -> int:
    """Frames in ranges that do not meet."""
    return sum(stop - start for start, stop in ranges)


def merged(ranges: list[Range]) -> tuple[Range, ...]:
    """The union of ranges that are given in order of their starts."""
    out: list[Range] = []
    for start, stop in ranges:
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return tuple(out)


@dataclass(frozen=True)
class FrameWindows:
    """The windows of `frames` frames."""

    frames: int
    chunk: int
    radius: int
    anchors: bool

    @property
    def _ends(self) -> tuple[list[Range], list[Range]]:
        return ([(0, 1)], [(self.frames - 1, self.frames)]) if self.anchors else ([], [])

    @property
    def inner(self) -> Range:
        """The frames that are no anchors."""
        return (1, max(1, self.frames - 1)) if self.anchors else (0, self.frames)

    @property
    def windows(self) -> tuple[Window, ...]:
        """One per chunk that has a frame which is no anchor."""
        first, last = self.inner
        found = []
        for index in range(-(-self.frames // self.chunk)):
            start, stop = max(first, index * self.chunk), min(last, (index + 1) * self.chunk)
            low, high = (index - self.radius) * self.chunk, (index + self.radius + 1) * self.chunk
            if start < stop:
                found.append(Window(start, stop, max(low, 0), min(high, self.frames)))
        return tuple(found)

    @property
    def rows(self) -> tuple[Rows, ...]:
        """Every frame as a query once, anchors first; one group where each sees all."""
        whole = ((0, self.frames),)
        first, last = self._ends
        found = [Rows(merged([*first, *last]), whole)] if self.anchors else []
        for start, stop, low, high in self.windows:
            found.append(Rows(((start, stop),), merged([*first, (low, high), *last])))
        return (Rows(whole, whole),) if all(rows.keys == whole for rows in found) else tuple(found)

    def beyond(self, window: Window) -> tuple[Range, Range]:
        """Frames that the window does not hold and that are no anchors: those before it and those after it."""
        first, last = self.inner
        return (first, max(first, window.low)), (min(last, window.high), last)

    @property
    def covered(self) -> bool:
        """Does every frame see every frame?"""
        return all(rows.keys == ((0, self.frames),) for rows in self.rows)

    def pairs(self, tokens: int, extra: int = 0) -> int:
        """Query-key pairs of the grid's rows: `tokens` per frame, `extra` keys seen by all."""
        return sum(count(rows.queries) * tokens * (count(rows.keys) * tokens + extra) for rows in self.rows)
