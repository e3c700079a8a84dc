"""The JSON Schema against the `jsonschema` library: shipped and resolved recipes pass, bad ones do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.recipe.random_recipes import recipes
from tests.recipe.samples import WAN, branched, problems_of, resolved, small
from ultrazoo import recipe
from ultrazoo.recipe import text
from ultrazoo.recipe.tree import plain

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = recipe.json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_recipes_are_accepted(validator: Draft202012Validator, path: Path) -> None:
    written = plain(text.read(path.read_text(encoding="utf-8"), path.name))
    assert list(validator.iter_errors(written)) == []
    assert list(validator.iter_errors(resolved(path).data())) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"*": "full", "0-2, last1": {"name": "dense", "kernel": "math"}}},
        {"attention": {"*": {"cycle": ["full", branched()]}}},
        {"attention": {"*": branched(a={"layout": {"name": "windows", "counts": {"cycle": [2, [2, 3]]}}})}},
        {"attention": {"*": {"name": "by_head", "groups": {"0-3": "full"}}}},
        {"sampling": {"steps": 4}, "steps": {"0-1": {"odd": "original"}}},
        {"seed": "${video.grid.0}"},
        {"weights": {"path": "x.safetensors", "format": "wan"}},
        {"search": {"space": {"seed": {"choice": [1, 2]}, "backbone.dim": {"log_range": [8, 64]}}}},
        {"attention": {"*": {"name": "acme/own", "anything": 1}}},
        {"backbone": {"name": "wan", "preset": "ti2v_5b"}},
    ],
)
def test_accepted(validator: Draft202012Validator, changes: dict[str, Any]) -> None:
    assert list(validator.iter_errors(small(**changes))) == []


def test_what_is_laid_over_others_need_not_be_whole(validator: Draft202012Validator) -> None:
    over = {"extends": "ultragen_4k", "attention": {"*": {"branches": {"global": None}}, "0-2": None}}
    assert list(validator.iter_errors(over)) == []
    assert list(validator.iter_errors({**over, "vidoe": {}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"vidoe": {}},
        {"schema": 2},
        {"seed": "3"},
        {"seed": -1},
        {"dtype": "bf16"},
        {"video": {"width": "16", "height": 16}},
        {"video": {"grid": [1, 2, 3, 4]}},
        {"sampling": {"guidance": 3}},
        {"weights": {"path": "x", "format": "hub"}},
        {"backbone": "no"},
        {"backbone": {"name": "wam"}},
        {"backbone": {"name": "wan", "preset": "xl_2"}},
        {"backbone": {**WAN, "heads": 0}},
        {"backbone": {**WAN, "depth": 3}},
        {"attention": {}},
        {"attention": "full"},
        {"attention": {"frist3": "full"}},
        {"attention": {"*": "ful"}},
        {"attention": {"*": {"kernel": "auto"}}},
        {"attention": {"*": {"name": "full", "window": 3}}},
        {"attention": {"*": {"name": "branched"}}},
        {"attention": {"*": {"cycle": []}}},
        {"attention": {"*": {"cycle": ["full"], "name": "full"}}},
        {"attention": {"*": branched(a={"layout": {"name": "whole", "counts": 3}})}},
        {"attention": {"*": branched(a={"compress": {"name": "avg_pool", "factor": -2}})}},
        {"attention": {"*": branched(a={"compress": {"name": "avg_pool", "factor": [2, 0]}})}},
        {"attention": {"*": branched(a={"adapt": {"name": "lorra"}})}},
        {"attention": {"*": branched(a={"coords": {"origin": "gridd"}})}},
        {"steps": {"0-1": "full"}},
        {"search": {"space": {"seed": {"choose": [1]}}}},
        {"search": {"space": {"seed": {"range": [1]}}}},
    ],
)
def test_rejected(validator: Draft202012Validator, changes: dict[str, Any]) -> None:
    assert list(validator.iter_errors(small(**changes)))
    assert problems_of(small(**changes))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.booleans().flatmap(recipes))
def test_what_check_accepts_the_schema_accepts(validator: Draft202012Validator, source: dict[str, Any]) -> None:
    accepted = not list(validator.iter_errors(source))
    assert accepted or problems_of(source)
