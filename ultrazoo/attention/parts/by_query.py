"""Tiles of keys for every query by itself: the order of tokens is that of tiles, and each query is a block of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...grid import Grid
from ...ops.blocks import even_blocks
from ...spec import Segment, option
from .orders import Place, TilesSpec


@dataclass(frozen=True, kw_only=True)
class ByQuerySpec(TilesSpec):
    """Tiles as key blocks, chosen for single queries; extra tokens that follow the pattern choose one by one as well."""

    name: ClassVar[str] = "tiles_by_query"

    tile: tuple[int, ...] = option((2, 0, 0), "tokens (T, H, W) per tile; 0: the whole axis", ge=0)

    def tile_of(self, grid: Grid) -> tuple[int, int, int]:
        found = super().tile_of(grid)
        t, h, w = (size or length for size, length in zip(found, grid, strict=True))
        return (t, h, w)

    @property
    def segment_block(self) -> int:
        return 128

    def place(self, grid: Grid) -> Place:
        found = super().place(grid)
        queries = even_blocks(grid.tokens, 1)
        # what asks for tiles on both sides finds none
        return _ByQuery(
            grid,
            found.order,
            queries,
            found.keys,
            queries.count,
            found.grid_keys,
            found.selectable,
            (1, *found.whole[1:]),
        )


class _ByQuery(Place):
    """A place whose extra queries stand alone, too."""

    def with_segments(self, segments: tuple[Segment, ...], block: int) -> Place:
        found = super().with_segments(segments, block)
        return replace(found, queries=even_blocks(self.queries.tokens + len(found.query_rows), 1))
