"""Where recipes are found: paths, shipped names, packages, and what is said when there is none."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tests.recipe.samples import problems_of, write
from ultrazoo import recipe, registry
from ultrazoo.recipe import find
from ultrazoo.recipe.text import LARGEST_FILE

ROOT = Path(__file__).parents[2]
TINY = "name: tiny\nsummary: words\n"


class Package:
    """What an entry point knows about its distribution."""

    def __init__(self, name: str):
        self.metadata = {"Name": name, "Summary": ""}
        self.version = "1.2"


def offer(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, str, str]) -> None:
    points = [
        EntryPoint(vendor, value, "ultrazoo.recipes")._for(Package(distribution))  # type: ignore[attr-defined]
        for vendor, value, distribution in rows
    ]
    monkeypatch.setattr(registry, "recipe_points", lambda: points)


def test_shipped_names_and_paths_are_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    by_name = recipe.load("ultragen_4k")
    by_path = recipe.load("recipes/ultragen_4k.yaml")
    assert by_name.file.samefile(by_path.file)
    assert by_name.source == by_path.source == "recipes/ultragen_4k.yaml"


def test_a_file_with_a_shipped_name_beats_it_only_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "mine", TINY)
    monkeypatch.chdir(tmp_path)
    assert recipe.load("mine").data()["summary"] == "words"
    assert recipe.load("./mine").file.name == "mine"


def test_names_of_a_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "acme_zoo/__init__.py", "raise RuntimeError('imported')\n")
    write(tmp_path, "acme_zoo/recipes/fast.yaml", TINY)
    write(tmp_path, "acme_zoo/recipes/broken.yaml", "a: [\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(monkeypatch, ("acme", "acme_zoo.recipes", "acme-zoo"), ("ghost", "no_such_package", "ghost-zoo"))
    assert recipe.load("acme/fast").data()["summary"] == "words"
    rows = {row.name: row for row in recipe.recipes()}
    assert rows["acme/fast"].summary == "words"
    assert (rows["acme/fast"].distribution, rows["acme/fast"].version) == ("acme-zoo", "1.2")
    assert "not YAML" in rows["acme/broken"].problem
    assert "no_such_package" in rows["ghost/"].problem
    assert "acme_zoo" not in sys.modules


def test_a_name_claimed_twice_is_an_error_that_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one_zoo", "two_zoo"):
        write(tmp_path, f"{package}/fast.yaml", TINY)
        write(tmp_path, f"{package}/__init__.py", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(monkeypatch, ("acme", "one_zoo", "one-zoo"), ("acme", "two_zoo", "two-zoo"))
    found = problems_of("acme/fast")
    assert "one-zoo 1.2, two-zoo 1.2" in found[0].rule
    assert any("claimed 2 times" in row.problem for row in recipe.recipes())


def test_the_list_has_every_shipped_recipe_with_its_summary() -> None:
    rows = {row.name: row for row in recipe.recipes() if row.distribution == "ultrazoo"}
    assert set(rows) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert all(row.summary and not row.problem for row in rows.values())


def test_the_wheel_has_its_recipes_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = write(tmp_path, "ultrazoo/recipes/only.yaml", TINY).parent
    monkeypatch.setattr(find, "__file__", str(tmp_path / "ultrazoo" / "recipe" / "find.py"))
    assert find.shipped_folder() == inside
    assert recipe.load("only").data()["summary"] == "words"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nope.yaml", "no such file"),
        ("tinny.yaml", "did you mean 'tiny.yaml'?"),
        ("ultragen4k", "did you mean 'ultragen_4k'?"),
        ("acme/nope", "no recipe is called"),
        ("~nobody-0/nope.yaml", "no such file"),
        ("~nobody-0", "no recipe is called"),
        ("sub", "is a directory"),
        ("sub.yaml", "is a directory"),
        ("binary.yaml", "not UTF-8"),
        ("large.yaml", "not a recipe"),
        ("empty.yaml", "empty"),
        ("list.yaml", "a recipe is a mapping"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    write(tmp_path, "tiny.yaml", TINY)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST_FILE + 1))
    write(tmp_path, "empty.yaml", "")
    write(tmp_path, "list.yaml", "[1, 2]")
    monkeypatch.chdir(tmp_path)
    assert words in str(problems_of(source)[0])


@pytest.mark.parametrize("source", [3, None, [1], b"x"])
def test_what_is_no_source(source: object) -> None:
    assert "expected a path, a name or a mapping" in problems_of(source)[0].rule  # type: ignore[arg-type]
