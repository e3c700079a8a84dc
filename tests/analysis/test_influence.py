"""Views of a query: counts, groups of layers, queries that do not exist, a 4K grid."""

from __future__ import annotations

import time
import tracemalloc
from typing import ClassVar

import numpy as np
import pytest

from tests.cost.fakes import Rows, Share, Toy
from ultrazoo.analysis import influence, text
from ultrazoo.errors import UltrazooError, UsageError
from ultrazoo.grid import Grid

GRID = Grid(3, 10, 14)


def test_views_are_counted_on_the_grid():
    frame, row, whole = influence.views(Rows(), Toy().sites(GRID)[0], (1, 4, 5))
    assert (frame.name, row.name, whole.name) == ("frame", "row", "all")
    assert frame.tokens == whole.tokens == 140
    assert row.tokens == 14
    assert frame.per_frame.tolist() == [0, 1, 0]
    assert row.seen[1, 4].all()
    assert row.share == pytest.approx(14 / 420)


def test_layers_with_the_same_views_come_together():
    sites = Toy(depth=6).sites(GRID)
    groups = influence.grouped(sites, [Share(), Rows()] * 3)
    assert [group.layers for group in groups] == [(0, 2, 4), (1, 3, 5)]
    assert groups[0].title == "layers 0-4/2"
    assert groups[1].start == "needs tuning (arXiv:0000.00000)"
    assert [len(group.views) for group in groups] == [1, 3]


def test_a_composition_is_shown_beside_what_it_stands_for():
    sites = Toy(depth=2).sites(GRID)
    groups = influence.grouped(sites, [Rows(), Rows()], written=[Share(), Rows()])
    assert [group.attention for group in groups] == ["test/share = test/rows", "test/rows"]


def test_heads_that_see_differently_come_apart_and_are_joined():
    class ByHead(Share):
        groups: ClassVar[int] = 2

        def visible(self, site, queries=None):
            seen = np.zeros((8, 1, site.tokens), dtype=bool)
            for head in range(8):
                # heads 0, 2, … and 1, 3, … of two groups
                seen[head, 0, 3 * (head % self.groups) : 3 * (head % self.groups) + 2 + head % self.groups] = True
            return seen

    even, odd, whole = influence.views(ByHead(), Toy().sites(GRID)[0], (0, 0, 0))
    assert (even.name, even.tokens) == ("heads 0-6/2", 2)
    assert (odd.name, odd.tokens) == ("heads 1-7/2", 3)
    assert whole.tokens == 5

    class Alike(ByHead):
        groups: ClassVar[int] = 1

    class Many(ByHead):
        groups: ClassVar[int] = influence.MOST_HEADS + 1

    for joined, tokens in ((Alike(), 2), (Many(), 26 - 1)):
        (whole,) = influence.views(joined, Toy().sites(GRID)[0], (0, 0, 0))
        assert whole.tokens == tokens


def test_a_design_that_fails_is_named():
    class Broken(Share):
        def visible(self, site, queries=None):
            raise IndexError("off by one")

    with pytest.raises(
        UltrazooError, match=r"attention 'test/share' fails to answer visible\(\): IndexError: off by one"
    ):
        influence.views(Broken(), Toy().sites(GRID)[0], (0, 0, 0))


@pytest.mark.parametrize(
    ("query", "grid", "want"),
    [("1,4,5", GRID, (1, 4, 5)), ("4,5", Grid(1, 10, 14), (0, 4, 5)), ("0,4,5", Grid(1, 10, 14), (0, 4, 5))],
)
def test_queries_are_read(query, grid, want):
    assert influence.parse_query(query, grid) == want


@pytest.mark.parametrize(
    ("query", "rule"),
    [
        ("3,0,0", "t = 3 is outside the grid"),
        ("0,0,14", "x = 14 is outside"),
        ("0,-1,0", "y = -1 is outside"),
        ("1,2", "a query is t,y,x"),
        ("a,b,c", "a query is t,y,x"),
        ("", "a query is t,y,x"),
    ],
)
def test_queries_that_do_not_exist_are_refused(query, rule):
    with pytest.raises(UsageError, match=rule):
        influence.parse_query(query, GRID)


def test_the_default_query_is_on_every_grid():
    for grid in (Grid(1, 1, 1), Grid(2, 1, 3), GRID):
        query = influence.default_query(grid)
        assert all(0 <= at < size for at, size in zip(query, grid, strict=True))


def test_a_4k_grid_is_quick_and_small():
    grid = Grid(21, 136, 240)
    sites = Toy(depth=30).sites(grid)
    tracemalloc.start()
    begun = time.perf_counter()
    groups = influence.grouped(sites, [Share(), Rows()] * 15)
    drawn = text.render(groups)
    taken = time.perf_counter() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(group.layers) for group in groups] == [15, 15]
    assert "685 440 tokens, 100 %" in drawn
    assert taken < 10
    assert peak < 200 * 2**20


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("grid", [GRID, Grid(1, 33, 7), Grid(21, 136, 240)])
def test_text_fits_the_terminal_and_marks_the_query(width, grid):
    sites = Toy(depth=2).sites(grid)
    groups = influence.grouped(sites, [Share(), Rows()])
    drawn = text.render(groups, width=width, unicode=False)
    maps = [line for line in drawn.splitlines() if line.startswith(("|", "+"))]
    assert maps
    assert max(map(len, maps)) <= width
    assert sum(line.count("Q") for line in maps) == 4
    assert drawn.isascii()


def test_shares_of_cells_are_means_over_uneven_cells():
    values = np.arange(35.0).reshape(5, 7)
    got = text.cells(values, 2, 3)
    assert got[0, 0] == values[:2, :2].mean()
    assert got[1, 2] == values[2:, 4:].mean()
    assert text.cells(values, 5, 7).tolist() == values.tolist()
