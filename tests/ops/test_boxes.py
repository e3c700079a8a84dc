"""Axis views and tiles: the rules against counting, tiles that lose nothing, sizes that cost least."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.neighborhood import keys_of
from tests.oracles.sliding_tile import seen_along
from ultrazoo.ops import boxes
from ultrazoo.ops.boxes import AxisView
from ultrazoo.ops.pool import true_means
from ultrazoo.testing import assert_close


def keys(view: AxisView) -> list[list[int]]:
    """The tokens that every token sees."""
    order = view.order()
    found: list[list[int]] = [[] for _ in order]
    for place, token in enumerate(order):
        found[token] = [order[p] for p in range(view.low[place], view.high[place])]
    return found


def small_rules() -> list[tuple[int, int, int, int, bool]]:
    """Every legal (length, kernel, stride, dilation, causal) of short axes."""
    return [
        (n, k, s, d, causal)
        for n in range(1, 11)
        for k in range(1, n + 1)
        for s in range(1, k + 1)
        for d in range(1, n // k + 1)
        for causal in (False, True)
    ]


def test_neighborhoods_follow_the_rule() -> None:
    rules = small_rules()
    assert len(rules) > 500
    for n, k, s, d, causal in rules:
        found = keys(boxes.neighborhood(n, k, s, d, causal))
        assert found == [keys_of(p, n, k, s, d, causal) for p in range(n)], (n, k, s, d, causal)


def test_every_query_of_a_neighborhood_has_exactly_its_kernel() -> None:
    for n, k, s, d, causal in small_rules():
        view = boxes.neighborhood(n, k, s, d, causal)
        counts = [high - low for low, high in zip(view.low, view.high, strict=True)]
        assert view.pairs == sum(counts)
        if causal:
            assert max(counts) <= k
            assert all(token in seen and max(seen) == token for token, seen in enumerate(keys(view)))
        else:
            assert set(counts) == {k}


def test_sliding_tiles_follow_the_rule() -> None:
    for n, tile, window in itertools.product(range(1, 14), range(1, 7), (1, 3, 5, 7)):
        assert keys(boxes.sliding_tiles(n, tile, window)) == seen_along(n, tile, window), (n, tile, window)


def views() -> list[AxisView]:
    return [
        boxes.neighborhood(11, 4),
        boxes.neighborhood(11, 3, 2, 3),
        boxes.neighborhood(9, 5, 2, causal=True),
        boxes.sliding_tiles(11, 3, 3),
        boxes.whole(7),
        boxes.neighborhood(6, 1),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 20])
@pytest.mark.parametrize("index", range(6))
def test_tiles_hold_every_query_once_with_its_own_keys(index: int, size: int) -> None:
    view = views()[index]
    wanted, met = keys(view), []
    for tile in boxes.tiled(view, size):
        for queries, there in zip(tile.queries, tile.keys, strict=True):
            ranges = tile.seen or [(0, len(there))] * len(queries)
            met += queries
            assert len(queries) <= size
            for query, (first, end) in zip(queries, ranges, strict=True):
                assert list(there[first:end]) == wanted[query]
            assert {key for query in queries for key in wanted[query]} <= set(there)
    assert sorted(met) == list(range(view.length))


def test_tiles_of_a_stride_need_no_mask() -> None:
    for kernel, stride, size in ((2, 2, 2), (9, 3, 3), (8, 4, 4), (8, 4, 2)):
        assert all(tile.seen is None for tile in boxes.tiled(boxes.neighborhood(24, kernel, stride), size))
    assert any(tile.seen is not None for tile in boxes.tiled(boxes.neighborhood(24, 5), 4))


def test_interior_tiles_are_one_class() -> None:
    """However long the axis: two borders and the inside, so that the batches are few."""
    assert len(boxes.tiled(boxes.neighborhood(240, 9), 4)) <= 3
    assert len(boxes.tiled(boxes.neighborhood(240, 8, 1, 3), 4)) <= 6
    assert len(boxes.tiled(boxes.sliding_tiles(240, 8, 3), 8)) == 1


def price(axes: tuple[AxisView, ...], sizes: tuple[int, ...]) -> float:
    """Pairs visited and keys gathered of one choice of tiles."""
    pairs, gathered = 1, 1
    for view, size in zip(axes, sizes, strict=True):
        tiles = boxes.tiled(view, size)
        pairs *= sum(len(t.queries) * len(t.queries[0]) * len(t.keys[0]) for t in tiles)
        gathered *= sum(len(t.queries) * len(t.keys[0]) for t in tiles)
    return pairs + boxes.KEY_COST * gathered


def test_tiles_cost_least() -> None:
    axes = (boxes.whole(4), boxes.neighborhood(20, 7), boxes.neighborhood(24, 6, 2, 2))
    found = boxes.fitted(*axes)
    chosen = tuple(max(len(tile.queries[0]) for tile in axis) for axis in found.axes)
    tried = itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 10, 20), (1, 2, 3, 4, 6, 8, 12))
    assert price(axes, chosen) <= min(price(axes, sizes) for sizes in tried)
    assert boxes.visited(found) >= math.prod(view.pairs for view in axes)


def test_masks_stay_small() -> None:
    axes = (boxes.whole(21), boxes.neighborhood(68, 31), boxes.neighborhood(120, 53))
    found = boxes.fitted(*axes)
    largest = max(
        math.prod(len(tile.queries[0]) * len(tile.keys[0]) for tile in classes)
        for classes in boxes.batches(found)
        if any(tile.seen is not None for tile in classes)
    )
    assert largest <= boxes.MASK_ELEMENTS
    # where every mask would be too large, tiles that need none are taken
    huge = boxes.fitted(boxes.whole(81), boxes.neighborhood(90, 61), boxes.neighborhood(160, 105))
    assert all(tile.seen is None for axis in huge.axes for tile in axis)


def test_footprints() -> None:
    assert boxes.footprint(4, 8, 12, 3, 0) == (1, 2)
    assert boxes.footprint(3, 8, 12, 3, 0) == (0, 2)
    assert boxes.footprint(4, 9, 12, 3, 0) == (1, 3)
    assert boxes.footprint(4, 8, 12, 3, 1) == (0, 3)
    assert boxes.footprint(0, 4, 12, 6, 1) == (0, 3)
    assert boxes.footprint(0, 4, 12, 6, None) == (0, 6)
    assert boxes.footprint(6, 7, 7, 3, 0) == (2, 3)


def test_windows_beside_cells() -> None:
    tiles = boxes.windowed(11, 4, 12, 6, 1)
    pairs = sorted((q, c) for tile in tiles for q, c in zip(tile.queries, tile.cells, strict=True))
    assert [list(q) for q, _ in pairs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [list(c) for _, c in pairs] == [[0, 1, 2], [1, 2, 3, 4], [3, 4, 5]]


def test_true_means() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7, 4, dtype=torch.float64)
    found, counts = true_means(x, (2, 2, 3))
    pooled = F.avg_pool3d(x.movedim(-1, 1), (2, 2, 3), ceil_mode=True, count_include_pad=False).movedim(1, -1)
    assert_close("means", found, pooled, 1e-14)
    assert counts.shape == (1, 2, 3, 3)
    assert counts.flatten()[[0, -1]].tolist() == [12.0, 1.0]
    valid = torch.rand(2, 3, 5, 7) > 0.4
    valid[0, :2, :2, :3] = False
    found, counts = true_means(x, (2, 2, 3), valid)
    assert counts[0, 0, 0, 0] == 0
    assert found[0, 0, 0, 0].abs().max() == 0
    inside = valid[1, 2:, 2:4, 3:6]
    assert_close("masked", found[1, 1, 1, 1], x[1, 2:, 2:4, 3:6][inside].mean(0), 1e-14)
    assert counts.sum() == valid.sum()


def test_a_gathered_tile_holds_its_keys_and_its_mask() -> None:
    # one tile, nothing gathered
    assert boxes.tile_elements(boxes.Boxes((4, 1, 1), ((whole_axis(4),), (whole_axis(1),), (whole_axis(1),))), 10) == 0
    two = boxes.TileClass(((0, 1), (2, 3)), ((0, 1, 2), (1, 2, 3)))
    assert (
        boxes.tile_elements(boxes.Boxes((4, 1, 1), ((two,), (whole_axis(1),), (whole_axis(1),))), 10)
        == 2 * (2 + 3) * 10
    )
    seen = two._replace(seen=((0, 2), (1, 3)))
    found = boxes.tile_elements(boxes.Boxes((4, 1, 1), ((seen,), (whole_axis(1),), (whole_axis(1),))), 10)
    assert found == 2 * (2 + 3) * 10 + 6 + 3


def whole_axis(length: int) -> boxes.TileClass:
    places = (tuple(range(length)),)
    return boxes.TileClass(places, places)
