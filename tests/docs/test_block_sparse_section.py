"""The section on block-sparse attention: it names every part, its recipes check and run small, and what it says of plans holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

import ultrazoo
from tests.docs.shell import ROOT, Block, blocks
from ultrazoo import registry
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.contract import Call
from ultrazoo.attention.parts.rules import RULES
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.options import declared, parse_part
from ultrazoo.spec import Rope, Site

PAGE = "docs/recipes.md"
SECTION = (ROOT / PAGE).read_text(encoding="utf-8").partition("### block_sparse\n")[2].partition("\n## ")[0]
RECIPES = {
    yaml.safe_load(block.text)["name"]: block
    for block in blocks(PAGE)
    if block.language == "yaml" and "schema: 1" in block.text and "name: block_sparse" in block.text
}


def test_the_recipes_are_there() -> None:
    assert set(RECIPES) == {"kept_union", "chunks", "by_mass"}


def test_every_part_is_named() -> None:
    orders = next(row.choices for row in declared(BlockSparseSpec) if row.name == "order")
    names = {row.name for kind in ("selector", "far_field") for row in registry.entries(kind) if row.builtin}
    missing = [
        name for name in (*names, *orders, *RULES) if f"`{name}`" not in SECTION and f"**{name}**" not in SECTION
    ]
    assert not missing


def test_selectors_by_place_are_those_named() -> None:
    rows = [row for row in registry.entries("selector") if row.builtin]
    by_place = {row.name for row in rows if registry.find("selector", row.name).needs_grid}
    said = SECTION.partition("Selectors by place (")[2].partition(")")[0]
    assert set(said.replace("`", "").split(", ")) == by_place


@pytest.mark.parametrize("block", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_checked_and_its_attention_runs(block: Block) -> None:
    written = yaml.safe_load(block.text)
    assert ultrazoo.check(written) == []
    spec, problems = parse_part("attention", written["attention"]["*"])
    assert problems == []
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(6, 12, 18), rope=Rope(axes=(4, 2, 2)), steps=50)
    module = Standalone(spec, site)
    reset_parameters(module)
    x = torch.randn(1, site.tokens, site.dim)
    with torch.no_grad():
        sparse, dense = (
            module.attention(x, module.host, Call(grid=(6, 12, 18), step=step, state={}))
            for step in ((20, 50), (3, 50))
        )
    assert sparse.shape == x.shape
    assert sparse.isfinite().all()
    # the one with a budget is dense at the first steps
    assert sparse.equal(dense) == ("budget" not in block.text)


def _pairs(name: str, **rule: Any) -> tuple[int, int, int]:
    """Pairs of a layer as a plan counts them: expected, fewest, most."""
    written = yaml.safe_load(RECIPES[name].text)
    written["attention"]["*"]["selector"]["rule"] |= rule
    plan = ultrazoo.plan(written)
    cost = plan.resolved.attention[0].cost(plan.resolved.sites[0])
    return cost.pairs, cost.pairs_min, cost.pairs_max


def test_expected_prices_and_bounds_stay() -> None:
    fifth, two_fifths = _pairs("by_mass"), _pairs("by_mass", expected=0.4)
    assert 1.9 < two_fifths[0] / fifth[0] < 2
    assert two_fifths[1:] == fifth[1:]
    assert fifth[1] < fifth[0] < fifth[2]


def test_a_static_map_has_one_count() -> None:
    plan = ultrazoo.plan(yaml.safe_load(RECIPES["chunks"].text))
    cost = plan.resolved.attention[0].cost(plan.resolved.sites[0])
    assert (cost.pairs_min, cost.pairs_max) == (None, None)
