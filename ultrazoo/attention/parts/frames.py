"""Windows of whole frames as a static selector: chunks of frames that see the chunks around them, and anchor frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ...ops.frame_windows import FrameWindows
from ...spec import Site, option
from .orders import Place
from .selectors import SelectorSpec


@dataclass(frozen=True, kw_only=True)
class FramesSpec(SelectorSpec):
    """Key blocks that hold a token of a frame that a token of the query block sees: frames of its own chunk and of the
    chunks within `radius` of it, and anchors, which all see and which see all. Windows are rounded outward to blocks."""

    name: ClassVar[str] = "frames"
    source: ClassVar[str] = "VDN, code OpenVDN/vdn-minimax-h3 (id 2609.20744 second-hand)"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    chunk: int = option(5, "frames per chunk", ge=1)
    radius: int = option(1, "chunks that a chunk sees on either side", ge=0)
    anchors: Literal["both", "none"] = option(
        "both", "the first and the last frame: dense as rows and columns, or frames like any other"
    )

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        frames = place.grid.t
        sees = np.zeros((frames, frames), dtype=np.float32)
        for rows in FrameWindows(frames, self.chunk, self.radius, self.anchors == "both").rows:
            for start, stop in rows.queries:
                for low, high in rows.keys:
                    sees[start:stop, low:high] = 1
        queries, keys = (_frames_of(place, starts) for starts in (place.queries.starts, place.keys.starts))
        seen = (queries[lo:hi] @ sees > 0).astype(np.float32)
        return (seen @ keys[: place.selectable].T > 0)[None]


def _frames_of(place: Place, starts: tuple[int, ...]) -> np.ndarray:
    """(blocks of the grid, frames), 1 where a block holds a token of a frame."""
    grid = place.grid
    frame = np.arange(grid.tokens) // (grid.h * grid.w)
    if place.order is not None:
        frame = frame[place.order]
    first = [start for start in starts if start < grid.tokens]
    held = np.zeros((len(first), grid.t), dtype=np.float32)
    held[np.repeat(np.arange(len(first)), np.diff([*first, grid.tokens])), frame] = 1
    return held
