"""Blocks of tokens, by counting: orders of the grid, runs and tiles of it, blocks of extra tokens.

A block is a list of token numbers; grid tokens come first, t-major, extra tokens after them. Sources: STA (arXiv
2502.04507) for tiles, Sparse VideoGen (2502.01776) for columns, DFSAttn (2605.23445) and Sol-Attn (2607.24027) for curves,
Skilling (AIP Conf. Proc. 707, 2004) for the Hilbert curve, here walked from its index to its place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ultrazoo.spec import Segment

Block = list[int]


@dataclass
class Layout:
    """Query blocks and key blocks. The first `selectable` key blocks may be chosen, the others are seen by all.

    The first `grid_queries` and `grid_keys` blocks are of the grid. `query_size` and `key_size` are the tokens of a whole
    block of the grid, `extra_size` those of a whole block of extra tokens.
    """

    queries: list[Block]
    keys: list[Block]
    selectable: int
    grid_queries: int
    grid_keys: int
    query_size: int
    key_size: int
    extra_size: int

    @property
    def query_tokens(self) -> Block:
        return [token for block in self.queries for token in block]


def token(place: Sequence[int], grid: Sequence[int]) -> int:
    t, h, w = place
    return (t * grid[1] + h) * grid[2] + w


def places(grid: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in grid)))


def raster(grid: Sequence[int]) -> Block:
    return list(range(math.prod(grid)))


def columns(grid: Sequence[int]) -> Block:
    """All frames of one place of the picture, then the next place."""
    return [token((t, h, w), grid) for h in range(grid[1]) for w in range(grid[2]) for t in range(grid[0])]


def cube_bits(grid: Sequence[int]) -> int:
    """Bits of a coordinate in the smallest cube of a power of two that holds the grid."""
    bits = 0
    while 2**bits < max(grid):
        bits += 1
    return bits


def spread(index: int, bits: int) -> list[int]:
    """Every third bit of `index` belongs to one axis, the first axis's bits are the highest of each three."""
    found = [0, 0, 0]
    for level in range(bits):
        three = (index >> (3 * (bits - 1 - level))) & 7
        for axis in range(3):
            found[axis] = 2 * found[axis] + ((three >> (2 - axis)) & 1)
    return found


def hilbert_place(index: int, bits: int) -> list[int]:
    """Coordinates of the index-th point of the Hilbert curve: Gray decode, then undo the turns from the finest level up."""
    x = spread(index, bits)
    last = x[2] >> 1
    for axis in (2, 1):
        x[axis] ^= x[axis - 1]
    x[0] ^= last
    for level in range(1, bits):
        bit = 2**level
        for axis in (2, 1, 0):
            if x[axis] & bit:
                x[0] ^= bit - 1
            else:
                swap = (x[0] ^ x[axis]) & (bit - 1)
                x[0] ^= swap
                x[axis] ^= swap
    return x


def curve(grid: Sequence[int], name: str) -> Block:
    """Along the curve through the cube, places off the grid left out."""
    bits = cube_bits(grid)
    walk = hilbert_place if name == "hilbert" else spread
    found = []
    for index in range(8**bits):
        place = walk(index, bits)
        if all(at < n for at, n in zip(place, grid, strict=True)):
            found.append(token(place, grid))
    return found


def cut(tokens: Sequence[int], size: int) -> list[Block]:
    """Runs of `size` tokens; the last may be shorter."""
    return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]


def tile_at(order: Mapping[str, Any], grid: Sequence[int]) -> tuple[int, ...]:
    """Tokens (T, H, W) of a tile: images may have their own; never more than an axis has."""
    wanted = order["image_tile"] if grid[0] == 1 and order["image_tile"] is not None else order["tile"]
    return tuple(min(size, n) for size, n in zip(wanted, grid, strict=True))


def tiles(grid: Sequence[int], tile: Sequence[int]) -> list[Block]:
    """Tile after tile, t-major among tiles and inside them; those at the far borders hold what is left."""
    counts = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    found = []
    for corner in itertools.product(*(range(n) for n in counts)):
        ranges = [range(c * size, min((c + 1) * size, n)) for c, size, n in zip(corner, tile, grid, strict=True)]
        found.append([token(place, grid) for place in itertools.product(*ranges)])
    return found


def grid_blocks(order: Mapping[str, Any], grid: Sequence[int]) -> tuple[list[Block], list[Block], int, int]:
    """Query blocks, key blocks, and how many tokens a whole one of either has."""
    if order["name"] == "tiles":
        tile = tile_at(order, grid)
        found = tiles(grid, tile)
        return found, found, math.prod(tile), math.prod(tile)
    if order["name"] == "curve":
        tokens = curve(grid, order["curve"])
    else:
        tokens = {"raster": raster, "columns": columns}[order["name"]](grid)
    block = order["block"]
    query_size, key_size = (block, block) if isinstance(block, int) else block
    return cut(tokens, query_size), cut(tokens, key_size), query_size, key_size


def under(segments: Sequence[Segment], rows: str, keys: str) -> tuple[Segment, ...]:
    """Segments whose policies a design sets: ``host`` keeps theirs, ``videos`` makes rows of several frames follow the
    pattern and all others dense."""
    found = []
    for one in segments:
        frames = 1 if one.grid is None else one.grid[0]
        own_rows = {"host": one.rows, "videos": "pattern" if frames > 1 else "dense"}.get(rows, rows)
        own_keys = one.keys if keys == "host" else keys
        found.append(Segment(one.kind, one.length, one.grid, own_rows, own_keys))  # type: ignore[arg-type]
    return tuple(found)


def layout(order: Mapping[str, Any], grid: Sequence[int], segments: Sequence[Segment] = ()) -> Layout:
    """Blocks of the grid, then those of extra tokens: queries whose rows follow the pattern, keys that compete, keys that
    all see. No block crosses a segment, and one holds as many tokens as a key block, or as a tile not cut by the grid."""
    queries, keys, query_size, key_size = grid_blocks(order, grid)
    extra_size = math.prod(order["tile"]) if order["name"] == "tiles" else key_size
    grid_queries, grid_keys = len(queries), len(keys)
    starts = list(itertools.accumulate((s.length for s in segments), initial=math.prod(grid)))
    runs = [(s, range(a, b)) for s, a, b in zip(segments, starts, starts[1:], strict=False)]
    pattern = [b for s, run in runs if s.rows == "pattern" for b in cut(run, extra_size)]
    compete = [b for s, run in runs if s.keys == "compete" for b in cut(run, extra_size)]
    always = [b for s, run in runs if s.keys == "always" for b in cut(run, extra_size)]
    return Layout(
        queries=[*queries, *pattern],
        keys=[*keys, *compete, *always],
        selectable=grid_keys + len(compete),
        grid_queries=grid_queries,
        grid_keys=grid_keys,
        query_size=query_size,
        key_size=key_size,
        extra_size=extra_size,
    )
