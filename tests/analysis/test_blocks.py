"""Block maps: shares against counting pair by pair, block sizes, sampled queries."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cost.fakes import Rows, Share, Toy
from ultrazoo.analysis import blocks, text
from ultrazoo.analysis.blockpictures import block_figure
from ultrazoo.analysis.influence import Silent, grouped
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.parts.layouts import WindowsSpec
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopPSpec
from ultrazoo.attention.parts.selectors import BandSpec
from ultrazoo.errors import UsageError
from ultrazoo.grid import Grid

GRID = Grid(3, 5, 7)
WINDOWS = BranchedSpec(branches={"near": BranchSpec(layout=WindowsSpec(counts=(1, 2, 2)))})


def counted(seen: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    """Share of pairs seen of every pair of blocks, token by token."""
    places = [(t, y, x) for t in range(GRID.t) for y in range(GRID.h) for x in range(GRID.w)]
    owners = [tuple(at // size for at, size in zip(place, block, strict=True)) for place in places]
    order = sorted(set(owners))
    found, total = np.zeros((len(order),) * 2), np.zeros((len(order),) * 2)
    for q, q_owner in enumerate(owners):
        for k, k_owner in enumerate(owners):
            at = order.index(q_owner), order.index(k_owner)
            found[at] += seen[q, k]
            total[at] += 1
    return found / total


@pytest.mark.parametrize("block", [(1, 2, 3), (2, 5, 4), (3, 1, 7), (3, 5, 7), (1, 5, 7)])
def test_shares_are_those_of_pairs(block):
    site = Toy(dim=24, heads=2).sites(GRID)[0]
    maps = blocks.block_maps(WINDOWS, site, block)
    assert list(maps) == ["near", "all"]
    for one in maps.values():
        assert one.exact
        assert np.allclose(one.share, counted(WINDOWS.visible(site)[0], block), atol=1e-12), block


def test_branches_and_the_whole_have_maps_of_their_own():
    site = Toy().sites(GRID)[0]
    maps = blocks.block_maps(Rows(), site, (1, 1, 7))
    assert list(maps) == ["frame", "row", "all"]
    assert np.array_equal(maps["row"].share, np.eye(15))
    assert np.array_equal(maps["frame"].share, np.kron(np.eye(3), np.ones((5, 5))))
    assert maps["row"].seen == pytest.approx(1 / 15)


def test_few_queries_stand_for_a_block_where_all_are_too_many():
    site = Toy().sites(GRID)[0]
    rows = 3
    few = blocks.block_maps(Rows(), site, (1, 5, 7), answers=105 * rows * 3 * 4)["row"]
    assert (few.looked_at, few.of, few.exact) == (4, 35, False)
    assert few.title() == "3 blocks of 1x5x7 tokens, 4 of 35 queries of each looked at"
    assert (few.seen_text, few.data()["seen_bound"]) == ("at least 33 % of block pairs", "lower bound")
    assert few.data()["seen"] == few.seen
    # every query sees a row of its frame's five
    assert np.allclose(few.share, np.eye(3) / 5)


@pytest.mark.parametrize(
    "grid", [Grid(1, 1, 1), Grid(1, 64, 64), Grid(21, 136, 240), Grid(100, 2, 2), Grid(2, 7, 300), Grid(13, 1, 1)]
)
def test_a_map_nobody_chose_a_block_for_can_be_looked_at(grid):
    block = blocks.default_block(grid)
    number = np.prod([-(-side // size) for side, size in zip(grid, block, strict=True)])
    assert min(grid.tokens, 7) <= number <= blocks.MOST_BLOCKS
    assert blocks.parse_block(",".join(map(str, block)), grid) == block


@pytest.mark.parametrize(
    ("given", "rule"),
    [("1,2", "a block is t,h,w"), ("a,b,c", "a block is t,h,w"), ("0,1,1", "at least 1"), ("1,1,1", "is the most")],
)
def test_blocks_that_make_no_map_are_refused(given, rule):
    with pytest.raises(UsageError, match=rule):
        blocks.parse_block(given, Grid(21, 30, 52))


def test_a_block_larger_than_the_grid_is_the_grid():
    assert blocks.parse_block("8,8,8", GRID) == (3, 5, 7)


def test_a_design_that_fails_is_named():
    class Broken(Share):
        def visible(self, site, queries=None):
            raise IndexError("off by one")

    with pytest.raises(Silent, match="attention 'test/share' fails"):
        blocks.block_maps(Broken(), Toy().sites(GRID)[0])


@pytest.mark.parametrize("width", [40, 80, 120])
def test_text_fits_the_terminal(width):
    sites = Toy(depth=2).sites(GRID)
    groups = grouped(sites, [Share(), Rows()])
    maps = [blocks.block_maps(spec, site, (1, 1, 7)) for spec, site in zip([Share(), Rows()], sites, strict=True)]
    drawn = text.render_blocks(groups, maps, width=width, unicode=False)
    lines = [line for line in drawn.splitlines() if line.startswith(("|", "+"))]
    assert max(map(len, lines)) <= width
    assert drawn.isascii()
    assert "15 blocks of 1x1x7 tokens, every query looked at" in drawn
    assert "at least" not in drawn
    assert "of the queries looked at" not in drawn
    for words in ("frame", "33 % of block pairs", "row", "6.7 % of block pairs", "100 % of block pairs"):
        assert words in drawn


def test_a_map_of_few_queries_says_that_it_is_a_lower_bound():
    """Of the map's blocks more are seen by all queries than by one of each."""
    site = Toy(depth=1).sites(GRID)[0]
    groups = grouped([site], [WINDOWS])
    few = blocks.block_maps(WINDOWS, site, (3, 3, 3), answers=GRID.tokens * 2 * 6)
    whole = blocks.block_maps(WINDOWS, site, (3, 3, 3))
    assert few["all"].seen < whole["all"].seen
    assert whole["all"].data()["seen_bound"] == "exact"
    drawn = text.render_blocks(groups, [few])
    share = f"{100 * few['all'].seen:.0f} %"
    assert f"at least {share} of block pairs" in drawn
    assert "from 1 of 27 queries per block" in drawn
    assert "share of pairs seen, of the queries looked at" in drawn
    said = {axes.get_title(loc="left") for axes in block_figure(groups, [few]).axes}
    assert f"all: at least {share} of block pairs" in said
    # where everything is seen nothing can be added
    share = blocks.block_maps(Share(), site, (3, 3, 3), answers=GRID.tokens * 6)["all"]
    assert (share.exact, share.seen_text, share.data()["seen_bound"]) == (False, "100 % of block pairs", "exact")


def test_a_map_of_a_dynamic_design_says_what_is_computed_inside_it():
    """All blocks may be chosen, a fifth of them is."""
    spec = BlockSparseSpec(order=RasterSpec(block=7), selector=PooledSpec(rule=TopPSpec(floor=0.1, expected=0.2)))
    site = Toy(dim=24, heads=2).sites(GRID)[0]
    (one,) = blocks.block_maps(spec, site).values()
    assert one.seen == 1
    assert one.visits == pytest.approx((2 / 15, 0.2, 1))
    assert one.title().endswith("; inside it the data choose, about 20 % of all pairs (13 % to 100 %)")
    assert one.data()["visits"]["expected"] == pytest.approx(0.2)
    fixed = blocks.block_maps(BlockSparseSpec(order=RasterSpec(block=7), selector=BandSpec()), site)["all"]
    assert fixed.visits is None
    assert "choose" not in fixed.title()
    assert fixed.data()["visits"] is None
