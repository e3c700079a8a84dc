"""The order of tokens and the blocks they are cut into: what block-sparse attention selects from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np

from ...errors import Problem
from ...grid import Grid
from ...ops import orders
from ...ops.blocks import Blocks, even_blocks
from ...spec import Options, Segment, Site, option


@dataclass(frozen=True)
class Place:
    """Where tokens stand: `order` permutes the grid's tokens (None: as they are), `queries` and `keys` are their blocks.

    Blocks of the grid come first, then those of extra tokens: `selectable` key blocks may be selected, the ones after them
    are seen by all. `whole` is how many tokens a block of the grid's queries, of its keys and of extra tokens has that no
    border cuts. `tile` and `tiles` (per axis) where blocks are tiles of the grid. `query_rows` and `key_rows` are the extra
    tokens behind the grid's, in order.
    """

    grid: Grid
    order: np.ndarray | None
    queries: Blocks
    keys: Blocks
    grid_queries: int
    grid_keys: int
    selectable: int
    whole: tuple[int, int, int]
    tile: tuple[int, int, int] | None = None
    tiles: tuple[int, int, int] | None = None
    query_rows: tuple[int, ...] = ()
    key_rows: tuple[int, ...] = ()

    @property
    def extra_selectable(self) -> int:
        """Key blocks of extra tokens that compete with those of the grid."""
        return self.selectable - self.grid_keys

    @property
    def always_tokens(self) -> int:
        """Extra keys that every query sees."""
        return self.keys.tokens - self.keys.starts[self.selectable]

    def with_segments(self, segments: tuple[Segment, ...], block: int) -> Place:
        """The same with extra tokens: blocks never cross segments; selectable keys stand before those seen by all."""
        queries, keys, selectable = self.queries, self.keys, self.selectable
        query_rows: list[int] = []
        key_rows: list[int] = []
        ends = list(accumulate(segment.length for segment in segments))
        spans = [(one, range(end - one.length, end)) for one, end in zip(segments, ends, strict=True) if one.length]
        for policy in ("compete", "always"):
            for segment, span in spans:
                if segment.keys != policy:
                    continue
                more = even_blocks(segment.length, block)
                keys = keys.then(more)
                key_rows += span
                selectable += more.count if policy == "compete" else 0
        for segment, span in spans:
            if segment.rows == "pattern":
                queries = queries.then(even_blocks(segment.length, block))
                query_rows += span
        return replace(
            self,
            queries=queries,
            keys=keys,
            selectable=selectable,
            query_rows=tuple(query_rows),
            key_rows=tuple(key_rows),
        )


def ruled(segment: Segment, rows: str, keys: str) -> Segment:
    """A segment under the policies of a design: ``host`` leaves one as it is, rows ``videos`` follow the pattern where the
    segment has a grid of more than one frame, and see everything elsewhere."""
    if rows == "videos":
        rows = "pattern" if segment.grid is not None and segment.grid.t > 1 else "dense"
    given: Any = {name: to for name, to in (("rows", rows), ("keys", keys)) if to != "host"}
    return replace(segment, **given)


@dataclass(frozen=True, kw_only=True)
class OrderSpec(Options):
    """An order of the grid's tokens, cut into blocks."""

    def place(self, grid: Grid) -> Place:
        raise TypeError(f"{type(self).__name__} orders nothing")

    @property
    def segment_block(self) -> int:
        """Most extra tokens in one block."""
        return 128


@dataclass(frozen=True, kw_only=True)
class _Runs(OrderSpec):
    """Blocks of consecutive tokens in some order."""

    block: int | tuple[int, ...] = option(
        128, "tokens per block, or (of queries, of keys); extra tokens: of keys", ge=1
    )

    @property
    def sizes(self) -> tuple[int, int]:
        return (self.block, self.block) if isinstance(self.block, int) else (self.block[0], self.block[1])

    @property
    def segment_block(self) -> int:
        return self.sizes[1]

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.block, tuple) and len(self.block) != 2:
            return [Problem("block", f"got {len(self.block)} numbers", "give one, or two: of queries and of keys")]
        return []

    def permutation(self, grid: Grid) -> np.ndarray | None:
        return None

    def place(self, grid: Grid) -> Place:
        queries, keys = (even_blocks(grid.tokens, size) for size in self.sizes)
        whole = (*self.sizes, self.segment_block)
        return Place(grid, self.permutation(grid), queries, keys, queries.count, keys.count, keys.count, whole)


@dataclass(frozen=True, kw_only=True)
class RasterSpec(_Runs):
    """Tokens as they come, t-major."""

    name: ClassVar[str] = "raster"


@dataclass(frozen=True, kw_only=True)
class ColumnsSpec(_Runs):
    """Token-major: all frames of one place, then the next place."""

    name: ClassVar[str] = "columns"

    def permutation(self, grid: Grid) -> np.ndarray | None:
        return orders.columns(grid, 1)[0]


@dataclass(frozen=True, kw_only=True)
class CurveSpec(_Runs):
    """A 3-D space-filling curve."""

    name: ClassVar[str] = "curve"

    curve: Literal["hilbert", "morton"] = option("hilbert", "which one")

    def permutation(self, grid: Grid) -> np.ndarray | None:
        return orders.curve(grid, self.curve, 1)[0]


@dataclass(frozen=True, kw_only=True)
class TilesSpec(OrderSpec):
    """Tiles of the grid, one block each; smaller ones at the far borders. Images may use another tile."""

    name: ClassVar[str] = "tiles"

    tile: tuple[int, ...] = option((4, 4, 4), "tokens (T, H, W) per tile; extra tokens: as many per block", ge=1)
    image_tile: tuple[int, ...] | None = option(None, "the same at T = 1; null: `tile`, cut to one frame", ge=1)

    def problems(self, site: Site) -> list[Problem]:
        found = []
        for path, tile in (("tile", self.tile), ("image_tile", self.image_tile)):
            if tile is not None and len(tile) != 3:
                found.append(Problem(path, f"got {len(tile)} numbers", "give three: (T, H, W)"))
        return found

    def tile_of(self, grid: Grid) -> tuple[int, int, int]:
        """The tile at this grid; never longer than an axis."""
        tile = self.image_tile if self.image_tile is not None and grid.t == 1 else self.tile
        t, h, w = (min(size, length) for size, length in zip(tile, grid, strict=True))
        return (t, h, w)

    @property
    def segment_block(self) -> int:
        return prod(self.tile)

    def place(self, grid: Grid) -> Place:
        tile = self.tile_of(grid)
        order, blocks = orders.tiles(grid, tile)
        counts = orders.tile_counts(grid, tile)
        size, count = prod(tile), blocks.count
        whole = (size, size, self.segment_block)
        return Place(grid, order, blocks, blocks, count, count, count, whole, tile=tile, tiles=counts)


ORDERS: Mapping[str, type[OrderSpec]] = {
    "raster": RasterSpec,
    "columns": ColumnsSpec,
    "curve": CurveSpec,
    "tiles": TilesSpec,
}
