"""Orders of tokens: permutations there and back, blocks without gaps, curves that stay close, and the oracle's own walk."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import blocks as oracle
from ultrazoo.attention.parts.orders import ORDERS, ColumnsSpec, CurveSpec, OrderSpec, RasterSpec, TilesSpec
from ultrazoo.attention.parts.scene import ordered, restored
from ultrazoo.grid import Grid
from ultrazoo.ops import orders
from ultrazoo.ops.blocks import Blocks, block_counts, block_means, block_sums, even_blocks, of_sizes, padded, unpadded
from ultrazoo.spec import Segment
from ultrazoo.testing import plain

grids = st.builds(Grid, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
sizes = st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
tiles = st.tuples(*(st.integers(1, 10) for _ in range(3)))
specs = st.one_of(
    st.builds(RasterSpec, block=sizes),
    st.builds(ColumnsSpec, block=sizes),
    st.builds(CurveSpec, block=sizes, curve=st.sampled_from(["hilbert", "morton"])),
    st.builds(TilesSpec, tile=tiles, image_tile=st.one_of(st.none(), tiles)),
)
policies = st.builds(
    Segment,
    kind=st.sampled_from(["text", "reference"]),
    length=st.integers(1, 7),
    rows=st.sampled_from(["dense", "pattern"]),
    keys=st.sampled_from(["always", "compete"]),
)


def tokens_of(blocks: Blocks, order: np.ndarray) -> list[list[int]]:
    return [order[a:b].tolist() for a, b in zip(blocks.starts, blocks.starts[1:], strict=False)]


@settings(max_examples=150, deadline=None)
@given(spec=specs, grid=grids)
def test_there_and_back(spec: OrderSpec, grid: Grid) -> None:
    place = spec.place(grid)
    z = torch.arange(2 * grid.tokens * 3, dtype=torch.float64).reshape(2, grid.tokens, 3, 1)
    moved = ordered(z, place)
    assert moved.is_contiguous()
    assert torch.equal(restored(moved, place), z)
    if place.order is not None:
        assert torch.equal(moved[:, 0, :, 0], z[:, :, 0, 0][:, torch.as_tensor(place.order)])


@settings(max_examples=150, deadline=None)
@given(spec=specs, grid=grids, segments=st.lists(policies, max_size=4))
def test_blocks_are_the_oracle_s(spec: OrderSpec, grid: Grid, segments: list[Segment]) -> None:
    """Every token of the grid once, extra tokens by their policies, equal segments told apart, no block across a border."""
    place = spec.place(grid).with_segments(tuple(segments), spec.segment_block)
    expected = oracle.layout(plain(spec), tuple(grid), segments)
    order = np.arange(grid.tokens) if place.order is None else place.order
    queries = np.concatenate([order, grid.tokens + np.asarray(place.query_rows, dtype=int)])
    keys = np.concatenate([order, grid.tokens + np.asarray(place.key_rows, dtype=int)])
    assert tokens_of(place.queries, queries) == expected.queries
    assert tokens_of(place.keys, keys) == expected.keys
    assert (place.selectable, place.grid_queries, place.grid_keys) == (
        expected.selectable,
        expected.grid_queries,
        expected.grid_keys,
    )
    assert sorted(keys.tolist()) == list(range(grid.tokens + sum(s.length for s in segments)))


def test_every_order_is_tried() -> None:
    assert set(ORDERS) == {"raster", "columns", "curve", "tiles"}


@pytest.mark.parametrize("side", [2, 4, 8])
def test_hilbert_never_jumps_in_a_cube(side: int) -> None:
    """Neighbours on the curve are neighbours in the cube; Morton's jump."""
    steps = {}
    for name in orders.CURVES:
        order, _ = orders.curve(Grid(side, side, side), name, 1)
        places = np.stack(np.unravel_index(order, (side,) * 3), axis=1)
        steps[name] = np.abs(np.diff(places, axis=0)).sum(axis=1)
    assert set(steps["hilbert"].tolist()) == {1}
    assert steps["morton"].max() > 1


def test_curves_begin_in_the_corner() -> None:
    for name in orders.CURVES:
        for grid in (Grid(1, 1, 1), Grid(3, 5, 7), Grid(1, 9, 4)):
            assert orders.curve(grid, name, 1)[0][0] == 0


def test_morton_has_x_as_its_lowest_bit() -> None:
    order, _ = orders.curve(Grid(2, 2, 2), "morton", 1)
    assert order.tolist() == list(range(8))
    order, _ = orders.curve(Grid(1, 4, 4), "morton", 1)
    assert order.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_a_block_of_a_curve_is_compact() -> None:
    """What the order is for: the box around 64 neighbours on the curve holds far fewer tokens than around 64 in a row."""
    grid = Grid(16, 16, 16)

    def spread(order: np.ndarray) -> float:
        places = np.stack(np.unravel_index(order, tuple(grid)), axis=1).reshape(-1, 64, 3)
        return float((places.max(axis=1) - places.min(axis=1) + 1).sum(axis=1).mean())

    raster = spread(np.arange(grid.tokens))
    for name in orders.CURVES:
        assert spread(orders.curve(grid, name, 64)[0]) < 0.8 * raster


@pytest.mark.parametrize(
    "blocks",
    [even_blocks(12, 4), even_blocks(13, 4), even_blocks(3, 8), of_sizes(np.array([4, 1, 6, 3])), even_blocks(1, 1)],
    ids=["even", "tail of one", "shorter than a block", "ragged", "one token"],
)
def test_statistics_of_blocks(blocks: Blocks) -> None:
    g = torch.Generator().manual_seed(blocks.tokens)
    z = torch.randn(2, 3, blocks.tokens, 5, generator=g, dtype=torch.float64)
    assert torch.equal(unpadded(padded(z, blocks), blocks), z)
    valid = torch.rand(2, blocks.tokens, generator=g) < 0.6
    valid[0, : blocks.starts[1]] = False
    for mask in (None, valid):
        real = torch.ones_like(valid) if mask is None else mask
        sums, counts, means = (
            block_sums(z, blocks, mask),
            block_counts(blocks, z.device, mask),
            block_means(z, blocks, mask),
        )
        for j, (a, b) in enumerate(zip(blocks.starts, blocks.starts[1:], strict=False)):
            for sample in range(2):
                own = z[sample, :, a:b][:, real[sample, a:b]]
                count = own.shape[1]
                assert float(counts.expand(2, -1, -1, -1)[sample, 0, j, 0]) == count
                torch.testing.assert_close(sums[sample, :, j], own.sum(1))
                torch.testing.assert_close(means[sample, :, j], own.sum(1) / max(1, count))


def test_blocks_between_start_at_zero() -> None:
    blocks = of_sizes(np.array([4, 1, 6, 3]))
    assert blocks.between(1, 3).starts == (0, 1, 7)
    assert blocks.between(0, 4) == blocks
    assert math.prod(blocks.between(2, 4).sizes) == 18
