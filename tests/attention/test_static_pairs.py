"""Pairs of static selectors that are known by arithmetic: what their maps hold, and no map is made for a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ultrazoo.attention.parts.frames import FramesSpec
from ultrazoo.attention.parts.orders import RasterSpec, TilesSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.selectors import BandSpec, SelectorSpec, SinkSpec, UnionSpec
from ultrazoo.attention.parts.sliding import SlidingSpec
from ultrazoo.grid import Grid
from ultrazoo.ops.frame_windows import FrameWindows
from ultrazoo.spec import Site

CASES = [
    ((5, 6, 10), (1, 1, 1), (3, 3, 3)),
    ((5, 7, 9), (2, 3, 4), (1, 3, 1)),
    ((4, 9, 11), (2, 2, 3), (2, 5, 3)),
    ((1, 8, 13), (4, 3, 5), (3, 7, 3)),
    ((6, 5, 5), (1, 2, 2), (9, 3, 8)),
]


def site(grid: Grid) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=grid)


@pytest.mark.parametrize(("grid", "tile", "window"), CASES, ids=str)
def test_pairs_of_a_window_of_tiles(
    grid: tuple[int, int, int], tile: tuple[int, int, int], window: tuple[int, int, int]
) -> None:
    at = site(Grid(*grid))
    place = TilesSpec(tile=tile).place(at.grid)
    spec = SlidingSpec(window=window)
    assert spec.place_problems(place, at) == []
    sizes = place.keys.sizes
    held = spec.map(place, at, 0, place.queries.count)[0]
    assert set(spec.bounds(place, at)) == {int(sizes @ held @ sizes)}
    assert not held.all() or all(size >= count for size, count in zip(window, place.tiles or (), strict=True))


@pytest.mark.parametrize("anchors", ["both", "none"])
@pytest.mark.parametrize(("frames", "chunk", "radius"), [(7, 2, 1), (12, 5, 0), (1, 5, 1), (2, 1, 0)], ids=str)
def test_windows_of_frames_are_vdn_s(frames: int, chunk: int, radius: int, anchors: Any) -> None:
    """Blocks of one frame: the pairs of VDN's softmax; smaller blocks round outward, and those that fill frames do not."""
    at = site(Grid(frames, 4, 3))
    spec = FramesSpec(chunk=chunk, radius=radius, anchors=anchors)
    due = FrameWindows(frames, chunk, radius, anchors == "both").pairs(12)
    assert spec.bounds(RasterSpec(block=12).place(at.grid), at).least == due
    assert spec.bounds(RasterSpec(block=(4, 6)).place(at.grid), at).least == due
    rounded = spec.bounds(RasterSpec(block=5).place(at.grid), at).least
    assert due <= rounded <= at.tokens**2


def test_a_union_asks_its_only_static_selector_for_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    at = site(Grid(4, 9, 11))
    place = TilesSpec(tile=(2, 2, 3)).place(at.grid)
    window = SlidingSpec(window=(1, 3, 3))
    wanted = window.bounds(place, at).least

    def refused(spec: SelectorSpec, *_: object) -> np.ndarray:
        raise AssertionError("a map was made for a plan")

    monkeypatch.setattr(SlidingSpec, "map", refused)
    found = UnionSpec(of=(PooledSpec(), window)).bounds(place, at)
    assert found.least >= wanted
    assert found.most > found.least


def test_static_selectors_that_overlap_are_counted_once() -> None:
    at = site(Grid(4, 9, 11))
    place = RasterSpec(block=8).place(at.grid)
    two = UnionSpec(of=(PooledSpec(), SinkSpec(frames=1), SinkSpec(frames=2)))
    one = UnionSpec(of=(PooledSpec(), SinkSpec(frames=2)))
    assert two.bounds(place, at) == one.bounds(place, at)


@pytest.mark.parametrize("block", [8, (8, 3), (5, 12), 1], ids=str)
@pytest.mark.parametrize("width", [0, 1, 4, 100])
def test_pairs_of_a_band(block: int | tuple[int, ...], width: int) -> None:
    at = site(Grid(3, 5, 7))
    place = RasterSpec(block=block).place(at.grid)
    spec = BandSpec(width=width)
    queries, keys = place.queries, place.keys
    pairs = 0
    for row in range(queries.count):
        first, end = max(row - width, 0), min(row + width + 1, queries.count)
        near = range(queries.starts[first], queries.starts[end])
        for column in range(keys.count):
            if any(token in near for token in range(keys.starts[column], keys.starts[column + 1])):
                pairs += int(queries.sizes[row] * keys.sizes[column])
                assert spec.map(place, at, row, row + 1)[0, 0, column]
    assert set(spec.bounds(place, at)) == {pairs}
    held = spec.map(place, at, 0, queries.count)[0]
    assert int(queries.sizes @ held @ keys.sizes) == pairs
