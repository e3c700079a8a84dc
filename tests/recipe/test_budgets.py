"""Budgets over sampling steps beside ``steps:`` of a recipe: a clip costs what its steps cost, whichever of the two says it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipe.samples import resolved, small
from ultrazoo import recipe

TOP = {"name": "pooled", "rule": {"name": "topk", "share": 0.2}}


def sparse(selector: dict[str, Any]) -> dict[str, Any]:
    return {"name": "block_sparse", "order": {"name": "raster", "block": 8}, "selector": selector}


def plan(attention: dict[str, Any], **more: Any) -> recipe.Plan:
    return recipe.make_plan(resolved(small(attention=attention, sampling={"steps": 10}, **more)))


@pytest.mark.parametrize("dense", ["0-4", "0-9", "0,7-9"])
def test_dense_steps_cost_the_same_by_budget_and_by_steps(dense: str) -> None:
    budget = sparse({"name": "budget", "of": TOP, "steps": {dense: 1.0}})
    full = {dense: {"*": "full"}}
    plans = [
        plan({"*": budget}),
        plan({"*": sparse(TOP)}, steps=full),
        plan({"*": budget}, steps=full),
    ]
    scores = (
        10 * 6 * resolved(small(attention={"*": sparse(TOP)})).attention[0].cost(plans[0].resolved.sites[0]).other_flops
    )
    for one in plans[1:]:
        # full attention scores no blocks
        assert abs(one.clip.flops - plans[0].clip.flops) <= scores
    assert plans[0].clip.flops > plan({"*": sparse(TOP)}).clip.flops


def test_a_layer_s_pairs_are_those_of_the_steps_at_which_it_runs() -> None:
    budget = sparse({"name": "budget", "of": TOP, "steps": {"0-4": 1.0}})
    alone, both = plan({"*": budget}), plan({"*": budget}, steps={"0-4": {"0-2": "full"}})
    top = plan({"*": sparse(TOP)})
    assert [layer.pairs for layer in both.layers] == 3 * [top.layers[0].pairs] + 3 * [alone.layers[0].pairs]
    assert alone.layers[0].pairs > top.layers[0].pairs


def test_a_range_of_steps_has_a_budget_of_its_own_steps() -> None:
    budget = sparse({"name": "budget", "of": TOP, "steps": {"0-4": 1.0}})
    late, early = (plan({"*": "full"}, steps={steps: {"*": budget}}) for steps in ("5-9", "0-4"))
    full, top = plan({"*": "full"}), plan({"*": "full"}, steps={"5-9": {"*": sparse(TOP)}})
    assert late.clip.flops == top.clip.flops
    assert early.clip.flops >= full.clip.flops
