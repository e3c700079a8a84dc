"""Prices of every attention grow in proportion to tokens: what it holds at once, what autograd keeps, and what pricing takes."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from typing import ClassVar

import pytest

from ultrazoo import registry
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Cost, Rope, Site

SITE = Site(dim=1536, heads=12, head_dim=128, layers=30, rope=Rope(axes=(44, 42, 42)), qk_norm=True)
# each has four times the tokens of the one before; the second is 4K with 81 frames
GRIDS = (Grid(21, 68, 120), Grid(21, 136, 240), Grid(21, 272, 480))
GROWTH = 4.5
PRICING_BYTES = 100 * 10**6
NAMES = sorted(row.name for row in registry.entries("attention") if row.builtin)


def grows(spec: AttentionSpec, layer: int) -> list[str]:
    """What of the price grows faster than tokens from one grid to the next."""
    found = []
    prices = [spec.expand(site).cost(site) for site in (SITE.at(grid=grid, layer=layer) for grid in GRIDS)]
    for small, large, grid in zip(prices, prices[1:], GRIDS[1:], strict=False):
        for what in ("peak_elements", "saved_elements"):
            before, after = getattr(small, what), getattr(large, what)
            assert before > 0, f"{spec.name} holds nothing"
            if after > GROWTH * before:
                found.append(f"{what} at {grid}: {after / before:.1f} times as many")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_memory_in_the_plan_is_in_proportion_to_tokens(name: str) -> None:
    spec, problems = parse_part("attention", {"name": name, **registry.find("attention", name).minimal})
    assert isinstance(spec, AttentionSpec), problems
    for layer in (0, 1):
        assert grows(spec, layer) == []


@pytest.mark.parametrize("name", NAMES)
def test_pricing_at_4k_holds_little(name: str) -> None:
    """Maps of 5 355 blocks squared, one byte each, would be 29 MB, and a row of tokens per block 3.7 GB."""
    spec, _ = parse_part("attention", {"name": name, **registry.find("attention", name).minimal})
    assert isinstance(spec, AttentionSpec)
    # a size that no other test asks for, so that nothing is known yet
    site = SITE.at(grid=Grid(21, 136, 238))
    tracemalloc.start()
    try:
        spec.expand(site).cost(site)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PRICING_BYTES


def test_the_comparison_sees_scores_of_all_tokens_and_of_all_blocks() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Scores(AttentionSpec):
        name: ClassVar[str] = "scores"
        block: int = 1

        def cost(self, site: Site) -> Cost:
            held = 5 * site.tokens * site.dim + (site.tokens // self.block) ** 2 * site.heads
            return Cost(pairs=1, attention_flops=1, peak_elements=held, saved_elements=held)

    assert len(grows(Scores(), 0)) == 4
    # twelve maps of 128-token blocks are few beside the stream at 4K, and show at four times as many tokens
    assert len(grows(Scores(block=128), 0)) == 2
