"""Random recipes: `check` lists problems or everything succeeds, never a third thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.recipe.random_recipes import recipes
from tests.recipe.samples import problems_of
from ultrazoo import assemble, recipe
from ultrazoo.errors import RecipeError

few_filters = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=100, deadline=None, suppress_health_check=few_filters)
@given(st.booleans().flatmap(recipes))
def test_check_lists_problems_or_the_plan_succeeds(source: dict[str, Any]) -> None:
    found = problems_of(source)
    event("problems" if found else "no problems")
    if found:
        with pytest.raises(RecipeError):
            recipe.resolve(recipe.load(source))
        return
    one = recipe.resolve(recipe.load(source))
    plan = recipe.make_plan(one)
    assert plan.totals.parameters > 0
    again = recipe.resolve(recipe.load(one.data()))
    assert again.hash == one.hash
    assert recipe.make_plan(again).totals == plan.totals


@settings(max_examples=25, deadline=None, suppress_health_check=few_filters)
@given(recipes(mistakes=False))
def test_what_has_no_problems_builds(source: dict[str, Any]) -> None:
    if problems_of(source):
        event("problems")
        return
    model = assemble.build(source, device="meta")
    with torch.device("meta"):
        assert sum(p.numel() for p in model.parameters()) == model.plan.totals.parameters
    event("built")
