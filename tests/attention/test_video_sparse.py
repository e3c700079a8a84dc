"""Video sparse attention in a packed sequence: tiles of extra tokens, those that all see and those that compete for visits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.oracles.video_sparse import video_sparse
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopKSpec
from ultrazoo.attention.video_sparse import VideoSparseSpec
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.spec import Rope, Segment, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(4, 4, 6), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
TILES = 12
"""Tiles (2, 2, 2) of that grid, 8 tokens each."""


def packed(keys: str, *lengths: int) -> tuple[Segment, ...]:
    return tuple(Segment(f"part {i}", length, keys=keys) for i, length in enumerate(lengths))  # type: ignore[arg-type]


def spec_of(**changes: Any) -> VideoSparseSpec:
    return replace(VideoSparseSpec(tile=(2, 2, 2), sparsity=0.75), **changes)


def at(spec: Any, extra: tuple[Segment, ...], grid: Grid | None = None) -> Scenario:
    site = SITE.at(extra=extra, grid=grid or SITE.grid)
    return Scenario(Example(spec, site, "packed"), torch.float64, extra=bool(extra))


def visited(spec: Any, extra: tuple[Segment, ...]) -> int:
    """Pairs per head and sample of grid rows, counted at the kernel door."""
    scenario = at(spec, extra)
    with record() as runs:
        scenario.run()
    # dense rows of extra tokens come after
    return runs[0].pairs // (2 * SITE.heads)


def test_competing_tiles_cost_what_exempt_ones_do() -> None:
    """Whole tiles everywhere: a quarter of 12 tiles and the 3 tiles of extra tokens, whoever chooses them."""
    spec = spec_of(gate="none")
    compete, always = packed("compete", 16, 8), packed("always", 16, 8)
    rows = 96 * 8 * (3 + 3)
    assert visited(spec, compete) == visited(spec, always) == rows
    dense = 24 * (96 + 24)
    for extra in (compete, always):
        cost = spec.cost(SITE.at(extra=extra))
        assert cost.pairs == cost.pairs_min == cost.pairs_max == rows + dense
    # a quarter of all 15 tiles, where competing tiles count like the grid's
    rule = TopKSpec(share=0.25)
    expanded = spec.expand(SITE.at(extra=compete))
    assert isinstance(expanded, BlockSparseSpec)
    counted = replace(expanded, selector=PooledSpec(rule=rule))
    assert visited(counted, compete) == 96 * 8 * 4


@pytest.mark.parametrize("gate", ["linear", "none"])
@pytest.mark.parametrize(
    "extra",
    [
        packed("compete", 5),
        packed("compete", 9, 1, 17),
        (Segment("text", 9), Segment("reference", 7, keys="compete"), Segment("audio", 3)),
        (Segment("nothing", 0, keys="compete"), Segment("reference", 11, keys="compete")),
    ],
    ids=["one", "three", "mixed", "an empty one"],
)
def test_packed_sequences_equal_the_oracle(extra: tuple[Segment, ...], gate: str) -> None:
    for grid in (SITE.grid, Grid(3, 5, 7), Grid(1, 5, 9)):
        scenario = at(spec_of(gate=gate), extra, grid)
        found, reference = scenario.run(), video_sparse(scenario.case())
        for name, got, wanted in zip(("grid", "extra"), found, reference, strict=True):
            assert_close(f"{name} {tuple(grid)}", got, wanted, 1e-11)


def test_who_competes_matters() -> None:
    """The same tokens as keys that all see give another answer."""
    compete = at(spec_of(), packed("compete", 9, 7))
    found, _ = compete.run()
    exempt = at(spec_of(), packed("always", 9, 7))
    exempt.runner.load_state_dict(compete.runner.state_dict())
    assert compete.extra is not None
    other, _ = exempt.run(x=compete.x, extra=replace(compete.extra, segments=packed("always", 9, 7)))
    assert error_ratio(other, found) > 0.02


def test_tiles_of_extra_tokens_never_cross_segments() -> None:
    extra = packed("compete", 5, 3)
    expanded = spec_of().expand(SITE.at(extra=extra))
    assert isinstance(expanded, BlockSparseSpec)
    place = expanded.place(SITE.at(extra=extra))
    assert list(place.keys.sizes[TILES:]) == [5, 3]
    assert place.extra_selectable == 2


def test_sparsity_zero_is_full_attention_over_the_packed_sequence() -> None:
    spec = spec_of(sparsity=0.0)
    assert spec.traits().exact_at_init
    fresh: dict[str, Any] = {"dtype": torch.float64, "extra": True, "random_weights": False}
    compete, always = packed("compete", 9, 7), packed("always", 9, 7)
    block = Scenario(Example(spec, SITE.at(extra=compete), "packed"), **fresh)
    full = Scenario(Example(FullSpec(), SITE.at(extra=always), "packed"), **fresh)
    full.runner.host.load_state_dict(block.runner.host.state_dict())
    assert block.extra is not None
    extra = replace(block.extra, segments=always)
    for got, wanted in zip(block.run(), full.run(x=block.x, extra=extra), strict=True):
        assert_close("full", got, wanted, 1e-11)


@pytest.mark.parametrize(
    ("options", "blocks", "extra", "number"),
    [
        ({"share": 0.25}, 15, 3, 6),
        ({"share": 0.01}, 15, 3, 4),
        ({"share": 1.0}, 15, 3, 15),
        ({"share": 0.25, "multiple": 4}, 15, 3, 7),
        ({"share": 0.25, "least": 5}, 15, 3, 8),
        ({"share": 0.26, "rounding": "down"}, 15, 3, 6),
        ({"count": 2}, 15, 3, 5),
        ({"count": 99}, 15, 3, 15),
        ({"share": 0.25}, 12, 0, 3),
    ],
    ids=str,
)
def test_added_visits(options: dict[str, Any], blocks: int, extra: int, number: int) -> None:
    """The number of the grid's blocks by every option of the rule, then one for each competing block."""
    rule = TopKSpec(**options, competing="added")
    assert rule.number(blocks, None, extra) == number
    assert rule.counts(blocks, None, extra) == (number, number, number)
    assert TopKSpec(share=0.9, competing="added").number(blocks, 0.25, extra) == -(-(blocks - extra) // 4) + extra


def test_soft_weights_add_up_to_the_added_number() -> None:
    assert TopKSpec(share=0.25, soft=0.1, competing="added").weight(15, 3) == 6.0
    assert TopKSpec(count=2, soft=0.1, competing="added").weight(15, 3) == 5
    assert TopKSpec(share=0.2, soft=0.1).weight(15, 3) == 3.0


def test_a_number_above_the_grid_s_blocks_is_refused() -> None:
    site = SITE.at(extra=packed("compete", 16))
    order = spec_of()._order()
    for competing, legal in (("added", TILES), ("counted", TILES + 2)):
        selector = PooledSpec(rule=TopKSpec(count=legal + 1, competing=competing))  # type: ignore[arg-type]
        (problem,) = BlockSparseSpec(order=order, selector=selector).problems(site)
        assert problem.path == "selector.rule.count"
        assert f"at most {legal}" in str(problem.fix)
