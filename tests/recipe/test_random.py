"""Random recipes: `check` lists problems or everything succeeds, never a third thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.recipe.random_recipes import recipes
from tests.recipe.samples import problems_of, small
from ultrazoo import assemble, recipe
from ultrazoo.errors import RecipeError
from ultrazoo.recipe.sections import SECTIONS

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


words = [
    "name",
    "full",
    "wan",
    "branched",
    "branches",
    "*",
    "0-2",
    "cycle",
    "layout",
    "windows",
    "counts",
    "space",
    "seed",
]
words += [
    "choice",
    "preset",
    "grid",
    "steps",
    "path",
    "${seed}",
    "${oc.env:HOME}",
    "extends",
    "dit_tiny",
    "video.grid",
    "",
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(words) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=few_filters)
@given(st.dictionaries(st.sampled_from([*SECTIONS, "nope"]), anything, max_size=8), st.booleans())
def test_any_data_in_any_section_is_a_recipe_or_has_problems(source: dict[str, Any], whole: bool) -> None:
    source = {**small(), **source} if whole else source
    found = problems_of(source)
    if found:
        with pytest.raises(RecipeError) as caught:
            recipe.resolve(recipe.load(source))
        assert str(caught.value)
    else:
        assert recipe.make_plan(recipe.resolve(recipe.load(source))).hash


@settings(max_examples=150, deadline=None)
@given(st.text("adb.=*[]{}:,'\"&! ${}0-9/attention", max_size=30))
def test_any_override_is_applied_or_has_problems(override: str) -> None:
    found = problems_of(small(), override)
    if not found:
        assert recipe.make_plan(recipe.resolve(recipe.load(small(), [override]))).hash
    assert all(problem.rule for problem in found)
