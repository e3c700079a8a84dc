"""``${…}``: nodes of the recipe itself, and nothing of the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.recipe.samples import branched, problems_of, small
from ultrazoo import recipe


def data(**changes: object) -> dict:
    return recipe.load(small(**changes)).data()


def test_values_mappings_and_text() -> None:
    found = data(
        seed="${video.grid.1}",
        summary="rows ${video.grid.1}, layers ${backbone.layers}",
        attention={"*": branched(), "odd": "${attention.*}"},
    )
    assert found["seed"] == 9
    assert found["summary"] == "rows 9, layers 6"
    assert found["attention"]["odd"] == found["attention"]["*"]


def test_overrides_come_first() -> None:
    assert recipe.load(small(seed="${video.grid.1}"), ["video.grid=[1, 4, 5]"]).data()["seed"] == 4


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("${oc.env:HOME}", "resolvers are refused"),
        ("${ oc.env : HOME }", "resolvers are refused"),
        ("x ${oc.decode:'1'} y", "resolvers are refused"),
        ("${mine:${video.frames}}", "resolvers are refused"),
        ("${video.${oc.env:HOME}}", "resolvers are refused"),
        ("${vidoe.grid}", "did you mean"),
        ("${seed}", "does not resolve"),
        ("${", "does not resolve"),
        ("${}", "does not resolve"),
    ],
)
def test_refused(value: str, words: str) -> None:
    assert words in str(problems_of(small(seed=value))[0])


def test_circles_between_entries() -> None:
    found = problems_of(small(seed="${summary}", summary="${seed}"))
    assert sorted(problem.path for problem in found) == ["seed", "summary"]


def test_unfolding_is_bounded() -> None:
    row = dict.fromkeys(map(str, range(20)), 0)
    nested = {f"k{i}": dict.fromkeys(map(str, range(20)), f"${{search.k{i - 1}}}") for i in range(1, 5)}
    found = problems_of(small(search={"k0": row, **nested}))
    assert any("unfolds to more than" in problem.rule for problem in found)


def test_omegaconf_is_imported_only_for_recipes_that_interpolate() -> None:
    code = "import sys; from ultrazoo import recipe; recipe.load('ultragen_4k'); print('omegaconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
