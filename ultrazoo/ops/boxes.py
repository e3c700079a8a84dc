"""Windows that differ from query to query, as dense batches: per axis, tiles of queries with one range of keys each.

A design says for every token of an axis which keys it sees: a contiguous range (`AxisView`). Neighbouring queries are cut
into tiles; a tile's keys are the union of its queries' ranges, with a mask where they differ. Tiles that look alike (equal
size, key count and mask) form a class; the product of the classes of three axes gives dense batches that share a mask. Only
integers here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .runs import balanced


@dataclass(frozen=True)
class AxisView:
    """What the tokens of one axis see: place i the places ``low[i]`` to ``high[i] - 1``.

    With a dilation d places count the residue classes modulo d one after the other; a range stays inside its class. Queries
    come in groups of `unit` that see the same: tiles of that size need no mask.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: int = 1
    unit: int = 1

    @property
    def length(self) -> int:
        return len(self.low)

    @property
    def pairs(self) -> int:
        """Query-key pairs of this axis."""
        return sum(self.high) - sum(self.low)

    @property
    def whole(self) -> bool:
        """Does every token see the whole axis?"""
        return self.pairs == self.length**2

    def order(self) -> list[int]:
        """The token at every place."""
        return [p for r in range(self.dilation) for p in range(r, self.length, self.dilation)]

    def classes(self) -> list[tuple[int, int]]:
        """First place and end of every residue class."""
        out, at = [], 0
        for r in range(min(self.dilation, self.length)):
            size = len(range(r, self.length, self.dilation))
            out.append((at, at + size))
            at += size
        return out


def whole(length: int) -> AxisView:
    """Every token sees the whole axis."""
    return AxisView((0,) * length, (length,) * length, unit=length)


@lru_cache(maxsize=512)
def neighborhood(length: int, kernel: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> AxisView:
    """Generalised neighbourhood attention along one axis (arXiv 2504.16922): `kernel` keys, `dilation` apart.

    Queries come in groups of `stride` (at most `kernel`) that share the window of their leader, the token at ``stride // 2``;
    a window that would pass a border is shifted inwards. Causal: keys up to the query itself, at most `kernel` of them back
    from the last token of the group.
    """
    low, high, start = [], [], 0
    left = kernel // 2
    right = kernel - left - 1
    for r in range(min(dilation, length)):
        size = len(range(r, length, dilation))
        for i in range(size):
            first = i // stride * stride
            if causal:
                last = min(first + stride - 1, size - 1)
                low.append(start + max(0, last - kernel + 1))
                high.append(start + i + 1)
            else:
                centre = min(max(min(first + stride // 2, size - 1), left), size - 1 - right)
                low.append(start + centre - left)
                high.append(start + centre + right + 1)
        start += size
    return AxisView(tuple(low), tuple(high), dilation, stride)


@lru_cache(maxsize=512)
def sliding_tiles(length: int, tile: int, window: int) -> AxisView:
    """A sliding window of `window` tiles, odd or at least all of them (arXiv 2502.04507); the last tile may be short.

    The centre is clamped so that the window stays inside the axis.
    """
    count, half = -(-length // tile), window // 2
    if window >= count:
        return AxisView((0,) * length, (length,) * length, unit=tile)
    centres = [min(max(i // tile, half), count - 1 - half) for i in range(length)]
    low = tuple((c - half) * tile for c in centres)
    high = tuple(min((c + half + 1) * tile, length) for c in centres)
    return AxisView(low, high, unit=tile)


class TileClass(NamedTuple):
    """Tiles of one axis that look alike.

    `queries` (tiles, size) and `keys` (tiles, count) are tokens of the axis; `seen` is each query's part of the keys as
    (first, end), None where every query sees all of them. `cells` (tiles, cells) are what the tile sees of a second, coarser
    axis, where there is one.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    seen: tuple[tuple[int, int], ...] | None = None
    cells: tuple[tuple[int, ...], ...] = ()


AxisTiles = tuple[TileClass, ...]


class Boxes(NamedTuple):
    """The tiles of three axes. `coarse` is the grid of the second set of keys, None where there is none."""

    grid: tuple[int, int, int]
    axes: tuple[AxisTiles, AxisTiles, AxisTiles]
    coarse: tuple[int, int, int] | None = None


def visited(boxes: Boxes) -> int:
    """Query-key pairs computed, what masks leave out included."""
    pairs = math.prod(sum(len(c.queries) * len(c.queries[0]) * len(c.keys[0]) for c in axis) for axis in boxes.axes)
    if boxes.coarse is not None:
        pairs += math.prod(
            sum(len(c.queries) * len(c.queries[0]) * len(c.cells[0]) for c in axis) for axis in boxes.axes
        )
    return pairs


def tile_elements(boxes: Boxes, width: int) -> int:
    """Elements of one tile where tiles are gathered, at most: queries, keys, values and output of `width`, and its mask."""
    masked = any(c.seen is not None for axis in boxes.axes for c in axis)
    if not masked and all(len(axis) == 1 and len(axis[0].queries) == 1 for axis in boxes.axes):
        return 0
    queries, keys = (
        math.prod(max(len(getattr(c, name)[0]) for c in axis) for axis in boxes.axes) for name in ("queries", "keys")
    )
    if boxes.coarse is not None:
        keys += math.prod(max(len(c.cells[0]) for c in axis) for axis in boxes.axes)
    # the mask is there as booleans, too
    mask = queries * keys if masked else 0
    return 2 * (queries + keys) * width + mask + mask // 2


def batches(boxes: Boxes) -> list[tuple[TileClass, TileClass, TileClass]]:
    """One class per axis, in every combination."""
    return [(t, h, w) for t in boxes.axes[0] for h in boxes.axes[1] for w in boxes.axes[2]]


@lru_cache(maxsize=1024)
def tiled(view: AxisView, size: int) -> AxisTiles:
    """The tiles of `size` neighbouring queries, the last of a residue class shorter, by class."""
    order = view.order()
    found: dict[object, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {}
    for first, end in view.classes():
        for start in range(first, end, size):
            places = range(start, min(start + size, end))
            low, high = min(view.low[p] for p in places), max(view.high[p] for p in places)
            seen = tuple((view.low[p] - low, view.high[p] - low) for p in places)
            alike = all(one == (0, high - low) for one in seen)
            queries, keys = found.setdefault((len(places), high - low, None if alike else seen), ([], []))
            queries.append(tuple(order[p] for p in places))
            keys.append(tuple(order[low:high]))
    return tuple(
        TileClass(tuple(queries), tuple(keys), seen)  # type: ignore[arg-type]
        for (_, _, seen), (queries, keys) in found.items()  # type: ignore[misc]
    )


# --- the size of tiles ----------------------------------------------------------------------------------------------

KEY_COST = 30.0
"""What a gathered key costs beside its pairs, in pairs: its copy, and that short tiles use matmuls badly."""

MASK_ELEMENTS = 1 << 24
"""Most elements of a mask, where smaller tiles can keep to it."""


class _Fit(NamedTuple):
    """An axis cut into tiles of `size`: pairs visited, keys gathered, largest size times count, and whether masks remain."""

    size: int
    visited: int
    keys: int
    largest: int
    masked: bool


def _sizes(view: AxisView) -> list[int]:
    """Tile sizes worth a try: a ladder, multiples of the unit, the whole axis."""
    length = view.length
    ladder = {s for e in range(9) for s in (1 << e, 3 << e, 5 << e, 7 << e)}
    units = {view.unit * n for n in (1, 2, 3, 4)}
    return sorted(s for s in ladder | units | {length} if s <= length)


@lru_cache(maxsize=1024)
def _fits(view: AxisView) -> tuple[_Fit, ...]:
    if view.whole:
        # nothing but memory for masks, which other axes may want, speaks for cutting it
        return tuple(
            _Fit(size, view.length**2, -(-view.length // size) * view.length, size * view.length, False)
            for size in _sizes(view)
        )
    found = []
    for size in _sizes(view):
        axis = tiled(view, size)
        counts = [(len(c.queries), len(c.queries[0]), len(c.keys[0])) for c in axis]
        found.append(
            _Fit(
                size,
                sum(n * q * k for n, q, k in counts),
                sum(n * k for n, _, k in counts),
                max(q * k for _, q, k in counts),
                any(c.seen is not None for c in axis),
            )
        )
    return tuple(found)


@lru_cache(maxsize=1024)
def fitted(t: AxisView, h: AxisView, w: AxisView) -> Boxes:
    """Tiles of the sizes that cost least: pairs visited plus keys gathered, masks within bounds."""
    best, chosen = math.inf, (1, 1, 1)
    for a, b in itertools.product(_fits(t), _fits(h)):
        pairs, keys, largest, masked = (
            a.visited * b.visited,
            a.keys * b.keys,
            a.largest * b.largest,
            a.masked or b.masked,
        )
        for c in _fits(w):
            cost = pairs * c.visited + KEY_COST * keys * c.keys
            if cost >= best:
                continue
            if (masked or c.masked) and largest * c.largest > MASK_ELEMENTS and best < math.inf:
                continue
            best, chosen = cost, (a.size, b.size, c.size)
    sizes = zip((t, h, w), chosen, strict=True)
    at, ah, aw = (tiled(view, size) for view, size in sizes)
    return Boxes((t.length, h.length, w.length), (at, ah, aw))


# --- windows beside a coarser map -----------------------------------------------------------------------------------


def footprint(first: int, end: int, span: int, cells: int, margin: int | None) -> tuple[int, int]:
    """Cells [low, high) that the tokens [first, end) touch, where `cells` equal ones cover `span` tokens, and `margin` more on
    either side as far as there are; None: all cells."""
    if margin is None:
        return 0, cells
    low, high = first * cells // span, -(-end * cells // span)
    return max(0, low - margin), min(cells, high + margin)


@lru_cache(maxsize=512)
def windowed(length: int, window: int, span: int, cells: int, margin: int | None) -> AxisTiles:
    """As few windows as keep to `window` tokens, as equal as can be; each with the cells of its footprint."""
    found: dict[tuple[int, int], tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {}
    first = 0
    for size in balanced(length, -(-length // window)).sizes():
        low, high = footprint(first, first + size, span, cells, margin)
        tokens, seen = found.setdefault((size, high - low), ([], []))
        tokens.append(tuple(range(first, first + size)))
        seen.append(tuple(range(low, high)))
        first += size
    return tuple(TileClass(tuple(t), tuple(t), None, tuple(c)) for t, c in found.values())
