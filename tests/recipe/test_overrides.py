"""``key=value``: paths, values, order, and what is refused."""

from __future__ import annotations

import pytest

from tests.recipe.samples import branched, names, problems_of, resolved, small
from ultrazoo import recipe


def data(*overrides: str, **changes: object) -> dict:
    return recipe.load(small(**changes), overrides).data()


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("seed=3", ["seed"], 3),
        ("video.grid=[1, 4, 5]", ["video", "grid"], [1, 4, 5]),
        ("video.grid.1=7", ["video", "grid", 1], 7),
        ("attention.*=full", ["attention", "*"], "full"),
        ("attention.0-2,5=original", ["attention", "0-2,5"], "original"),
        ("attention.0-4/2=original", ["attention", "0-4/2"], "original"),
        ("attention.'0-2, 5'=original", ["attention", "0-2, 5"], "original"),
        ('attention."odd"={name: full, kernel: math}', ["attention", "odd"], {"name": "full", "kernel": "math"}),
        ("attention.*.kernel=math", ["attention", "*", "kernel"], "math"),
        ("summary=a=b", ["summary"], "a=b"),
        ("summary='no'", ["summary"], "no"),
        ("summary=012", ["summary"], "012"),
        ("weights=null", ["weights"], None),
        (" seed = 4", ["seed"], 4),
    ],
)
def test_paths_and_values(override: str, keys: list, value: object) -> None:
    node = data(override)
    for key in keys:
        node = node[key]
    assert node == value


def test_a_bare_name_takes_options() -> None:
    assert data("attention.*.kernel=math", attention={"*": "full"})["attention"]["*"] == {
        "name": "full",
        "kernel": "math",
    }


def test_another_name_drops_the_options_but_those_of_the_same_line() -> None:
    start = {"attention": {"*": branched()}}
    path = "attention.*.branches.one.layout"
    assert data(f"{path}.name=whole", **start)["attention"]["*"]["branches"]["one"]["layout"] == {"name": "whole"}
    wanted = {"name": "strided", "counts": 3}
    for overrides in ([f"{path}.name=strided", f"{path}.counts=3"], [f"{path}.counts=3", f"{path}.name=strided"]):
        assert data(*overrides, **start)["attention"]["*"]["branches"]["one"]["layout"] == wanted
    assert data("attention.*.name=full", **start)["attention"]["*"] == {"name": "full"}
    assert data("attention.*={name: full}", **start)["attention"]["*"] == {"name": "full"}


def test_mappings_merge_into_what_is_there() -> None:
    found = data("attention.*={name: branched, branches: {two: {layout: whole}}}", attention={"*": branched()})
    assert list(found["attention"]["*"]["branches"]) == ["one", "two"]


def test_the_last_one_wins() -> None:
    assert data("seed=1", "seed=2")["seed"] == 2


def test_null_deletes_entries() -> None:
    found = data("attention.odd=full", "attention.odd=null")
    assert list(found["attention"]) == ["*"]
    two = branched(one={"layout": "whole"}, two={"layout": "whole"})
    assert list(data("attention.*.branches.two=null", attention={"*": two})["attention"]["*"]["branches"]) == ["one"]


def test_null_deletes_entries_that_parts_let_a_recipe_name() -> None:
    steps = {"0-3": 1.0, "4-9": 0.5}
    sparse = {"name": "block_sparse", "selector": {"name": "budget", "of": "pooled", "steps": steps}}
    override = 'attention.*.selector.steps={"0-3": null, "0-9": 0.2}'
    found = data(override, "attention.*.selector.steps.4-9=null", attention={"*": sparse})
    assert found["attention"]["*"]["selector"]["steps"] == {"0-9": 0.2}
    heads = {"name": "by_head", "groups": {"0-1": "full", "2-3": "full"}}
    found = data("attention.*.groups.2-3=null", attention={"*": heads})
    assert list(found["attention"]["*"]["groups"]) == ["0-1"]


def test_the_rules_hold_for_what_is_built() -> None:
    assert names(resolved(small(), "attention.odd=original")) == ["full", "original"] * 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "no sign of equality"),
        ("=3", "an empty segment"),
        ("a..b=3", "an empty segment"),
        (".a=3", "an empty segment"),
        ("seed=", "no value after the sign of equality"),
        ("seed=[1", "not YAML"),
        ("seed=!!python/none 1", "tags are refused"),
        ("'seed=3", "a quote that is not closed"),
        ("'seed'x=3", "follows a closing quote"),
        ("video.grid.3=1", "it has no item '3'"),
        ("video.grid.x=1", "it has no item 'x'"),
        ("video.grid.0.x=1", "video.grid.0 is 3 and holds nothing"),
        ("attention.3=null", "there is none"),
        ("summary=${oc.env:HOME}", "resolvers are refused"),
        ("summary=${nope}", "does not resolve"),
        ("vidoe.width=3", "did you mean 'video'?"),
        ("attention.*.kernl=math", "did you mean 'kernel'?"),
        ("attention.0-9=full", "layer 9 does not exist"),
    ],
)
def test_refused(override: str, words: str) -> None:
    found = problems_of(small(), override)
    assert words in "\n".join(map(str, found))
    assert all(problem.file == "command line" for problem in found)


def test_every_bad_override_is_listed() -> None:
    assert len(problems_of(small(), "a", "=b", "seed=", "seed=[")) == 4
