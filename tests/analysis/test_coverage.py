"""Coverage: layers until everything meets, against reachability by loops; closed forms; budgets and smaller grids."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from tests.cost.fakes import Rows, Share, Toy
from ultrazoo import registry
from ultrazoo.analysis import follow
from ultrazoo.analysis.coverage import coverage
from ultrazoo.analysis.influence import bound, grouped
from ultrazoo.analysis.text import render
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.linear import LinearSpec
from ultrazoo.attention.parts.far import MeanSpec
from ultrazoo.attention.parts.far_linear import LinearFarSpec
from ultrazoo.attention.parts.layouts import StridedSpec, WindowsSpec
from ultrazoo.attention.parts.shifts import RollSpec
from ultrazoo.attention.pisa import PisaSpec
from ultrazoo.attention.skip_softmax import SkipSoftmaxAttentionSpec
from ultrazoo.attention.sol import SolSpec
from ultrazoo.errors import Problem
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Segment, Site, Start, Traits

LARGE = Grid(21, 136, 240)


@dataclass(frozen=True, kw_only=True)
class Near(AttentionSpec):
    """Every token up to `radius` away along the flattened grid, or only those behind where `behind`."""

    name: ClassVar[str] = "test/near"
    radius: int = 1
    behind: bool = False
    least: int = 1

    def problems(self, site: Site) -> list[Problem]:
        return [Problem("", "the grid is too small")] if site.tokens < self.least else []

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        wanted = np.arange(site.tokens) if queries is None else np.asarray(queries)
        away = wanted[:, None] - np.arange(site.tokens)
        return ((away >= (0 if self.behind else -self.radius)) & (away <= self.radius))[None]

    def traits(self) -> Traits:
        return Traits(start=Start("exact"))


class Selects(Near):
    """`Near`, chosen by the data inside it."""

    def traits(self) -> Traits:
        return Traits(start=Start("exact"), visible="upper bound", selects=True)


def sites(grid: Grid, layers: int) -> list[Site]:
    return [Site(24, 2, 12, layer, layers, grid) for layer in range(layers)]


def by_loops(attention: Sequence[AttentionSpec], places: Sequence[Site]) -> tuple[int | None, set[tuple[int, int]]]:
    """Layers from the last until every set is complete, and the pairs that never meet; sets of numbers, no matrices."""
    tokens = places[0].tokens
    reached = {query: {query} for query in range(tokens)}
    done = None
    for depth, (spec, site) in enumerate(zip(reversed(attention), reversed(places), strict=True), 1):
        rows = spec.visible(site, None).any(axis=0)
        sees = {query: {query, *map(int, np.flatnonzero(rows[query]))} for query in range(tokens)}
        reached = {query: set().union(*(sees[token] for token in found)) for query, found in reached.items()}
        if done is None and all(len(found) == tokens for found in reached.values()):
            done = depth
    return done, {(query, token) for query in reached for token in range(tokens) if token not in reached[query]}


WINDOWS = BranchedSpec(branches={"near": BranchSpec(layout=WindowsSpec(counts=(1, 2, 2)))})
ROLLED = BranchedSpec(branches={"near": BranchSpec(layout=WindowsSpec(size=(2, 3, 3)), shift=RollSpec())})
REMOTE = BranchedSpec(branches={"far": BranchSpec(layout=StridedSpec(counts=(1, 2, 2)))})

CASES = {
    "one step a layer": [Near()] * 40,
    "too few layers": [Near()] * 3,
    "only behind": [Near(radius=4, behind=True)] * 30,
    "the last layer sees all": [Near(), Near(), Share()],
    "the first layer sees all": [Share(), Near(), Near()],
    "fixed windows": [WINDOWS] * 4,
    "rolled windows": [ROLLED] * 6,
    "windows, then strides": [WINDOWS, REMOTE],
    "rows and frames": [Rows()] * 3,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", [Grid(3, 4, 5), Grid(1, 5, 7)], ids=str)
def test_reachability_is_that_of_loops(case, grid):
    attention, places = CASES[case], sites(grid, len(CASES[case]))
    layers, apart = by_loops(attention, places)
    found = coverage(places, attention)
    assert (found.layers, found.apart, found.how) == (layers, len(apart), "all")
    assert found.pairs == grid.tokens**2
    assert found.exact
    assert (found.layers is None) == (found.reached[-1] < 1)
    if apart:
        query, token = ((t * grid.h + y) * grid.w + x for t, y, x in found.example)
        assert (query, token) in apart


def test_the_count_is_from_the_last_layer():
    attention = [Near(), Near(), Share()]
    assert coverage(sites(Grid(1, 5, 7), 3), attention).layers == 1
    assert coverage(sites(Grid(1, 5, 7), 3), attention[::-1]).layers == 3


def test_the_nearest_pair_is_the_example():
    found = coverage(sites(Grid(1, 1, 9), 2), [Near()] * 2)
    assert found.example == ((0, 0, 0), (0, 0, 3))
    assert found.reached == (2 / 9, 3 / 9)


BUILT_IN = [entry.name for entry in registry.entries("attention") if entry.builtin]


@pytest.mark.parametrize("name", BUILT_IN)
def test_reach_is_the_union_of_what_is_visible(name):
    generator = np.random.default_rng(3)
    for written, site in registry.find("attention", name).examples():
        spec = written.expand(site)
        tokens = generator.random((4, site.tokens)) < np.array([[0.5], [0.05], [0.02], [0]])
        tokens[:, generator.integers(site.tokens)] = True
        found = spec.reach(site, tokens)
        if found is None:
            continue
        rows = spec.visible(site, None).any(axis=0)
        want = np.stack([rows[np.flatnonzero(one)].any(axis=0) | one for one in tokens])
        assert np.array_equal(found, want), (name, site.grid, site.layer)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_attention_has_an_answer(name):
    for written, site in registry.find("attention", name).examples():
        places = [site.at(layer=layer, layers=4) for layer in range(4)]
        attention = [written.expand(one) for one in places]
        found = coverage(places, attention, [written] * 4)
        assert not found.unknown, found.unknown
        if site.tokens <= 300:
            layers, apart = by_loops(attention, places)
            assert (found.layers, found.apart) == (layers, len(apart))


def test_large_grids_are_followed_from_sampled_queries(monkeypatch):
    """A sample's sets are exact: the same as those of the whole grid's rows."""
    grid = Grid(3, 10, 14)
    attention, places = [ROLLED] * 4, sites(grid, 4)
    everything = coverage(places, attention)
    monkeypatch.setattr("ultrazoo.analysis.coverage.ALL_TOKENS", 100)
    for few in (0, 10_000):
        # by closed forms, then by rows
        monkeypatch.setattr(follow, "FEW", few)
        sampled = coverage(places, attention)
        assert (sampled.how, sampled.queries, sampled.grid) == ("sampled", follow.SAMPLES, grid)
        # corners see the least, and they are among the sample
        assert sampled.reached == everything.reached
        assert "from 12 sampled queries" in sampled.text()


def test_samples_hold_corners_and_middle():
    for grid in (LARGE, Grid(1, 5, 7), Grid(1, 1, 3), Grid(2, 1, 1)):
        found = follow.samples(grid)
        assert len(found) == min(follow.SAMPLES, grid.tokens)
        assert len(set(found.tolist())) == len(found)
        assert {0, grid.tokens - 1} <= set(found.tolist())


def test_what_is_too_much_is_estimated_on_a_smaller_grid():
    attention, places = [Near(radius=40)] * 3, sites(LARGE, 3)
    found = coverage(places, attention)
    assert found.how == "shrunken"
    assert found.model_grid == LARGE
    assert 3_000 < found.grid.tokens < 9_000
    ratios = [small / large for small, large in zip(found.grid, LARGE, strict=True)]
    assert max(ratios) < 1.3 * min(ratios)
    assert f"an estimate from 12 queries on the shrunken grid {found.grid}" in found.text()
    assert found.short().startswith("≈never (")


def test_a_smaller_grid_must_suit_the_design():
    picky = Near(radius=40, least=5_000)
    found = coverage(sites(LARGE, 3), [picky] * 3)
    assert found.grid.tokens >= 5_000
    none = coverage(sites(LARGE, 3), [Near(radius=40, least=600_000)] * 3)
    assert none.layers is None
    assert none.short() == "unknown"
    assert "test/near at grid" in none.text()
    assert "the grid is too small" in none.text()


def test_what_the_data_decide_is_at_least():
    found = coverage(sites(Grid(1, 1, 9), 8), [Selects()] * 8)
    assert found.layers == 8
    assert not found.exact
    assert found.short() == "≥8"
    assert "after at least 8 layers" in found.text()
    assert "exact" not in found.text()
    assert "fewer pairs may meet" in found.text()


FAR = {
    # whether the data can take pairs away
    "drop": (BlockSparseSpec(), True),
    "mean": (BlockSparseSpec(far=MeanSpec()), False),
    "sol": (SolSpec(block=8), False),
    "pisa": (PisaSpec(block=8), False),
    "linear": (LinearSpec(), False),
    "linear of the rest": (BlockSparseSpec(far=LinearFarSpec(keys="complement")), False),
    "lowest left out": (BlockSparseSpec(far=LinearFarSpec(keys="complement", skip=0.2)), True),
    "relu of the rest": (BlockSparseSpec(far=LinearFarSpec(phi="relu")), True),
    "skip_softmax": (SkipSoftmaxAttentionSpec(), True),
    "heads of both": (ByHeadSpec(groups={"0": SolSpec(block=8), "1": BlockSparseSpec()}), True),
    "heads with a far field": (ByHeadSpec(groups={"0": SolSpec(block=8), "1": FullSpec()}), False),
}


@pytest.mark.parametrize("case", FAR)
def test_what_reaches_every_block_is_not_at_least(case):
    written, selects = FAR[case]
    places = sites(Grid(3, 4, 5), 2)
    attention = [written.expand(site) for site in places]
    found = coverage(places, attention)
    assert (found.layers, found.selects, found.data()["selects"]) == (1, selects, selects)
    assert found.short() == ("≥1" if selects else "1")
    assert ("the data select" in found.text()) == ("at least" in found.text()) == selects
    assert (
        (found.bound == "exact")
        == (bound(attention[0])[0] == "exact")
        == ("weigh nothing" not in found.text() and not selects)
    )
    (group,) = grouped(places, attention, None, [written] * 2)
    assert (group.selects, group.bound) == (selects, found.bound)
    assert ("select lies inside" in render([group])) == selects


def test_only_layers_that_were_followed_decide():
    places = sites(Grid(1, 1, 9), 2)
    assert coverage(places, [Selects(), Share()]).exact
    assert coverage(places, [Share(), Selects()]).selects


def test_extra_tokens_are_told_apart():
    places = [site.at(extra=(Segment("text", 4),)) for site in sites(Grid(1, 1, 9), 2)]
    found = coverage(places, [Near()] * 2)
    assert found.layers is None
    assert "through them two layers are enough" in found.text()
    kept = [site.at(extra=(Segment("reference", 4, keys="compete"),)) for site in places]
    assert not coverage(kept, [Near()] * 2).extra


def test_a_design_that_fails_is_named():
    class Broken(Near):
        def visible(self, site, queries=None):
            raise IndexError("off by one")

    found = coverage(sites(Grid(1, 1, 9), 2), [Broken()] * 2)
    assert found.unknown == "attention 'test/near' fails to answer visible(): IndexError: off by one"
    assert found.short() == "unknown"


@pytest.mark.parametrize("kind", ["rolled", "rows", "near"])
def test_a_4k_model_is_answered_quickly_and_in_little_memory(kind):
    attention = {"rolled": ROLLED, "rows": Rows(), "near": Near(radius=40)}[kind]
    places = Toy(depth=30).sites(LARGE)
    tracemalloc.start()
    begun = time.perf_counter()
    found = coverage(places, [attention] * 30)
    taken = time.perf_counter() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not found.unknown
    assert taken < 10
    assert peak < 200 * 2**20
