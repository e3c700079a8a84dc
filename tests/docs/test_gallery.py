"""The gallery is the registry's: everything built in, with its formula and picture, and nothing that fails in silence."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest
import yaml

import ultrazoo
from tests.cost.fakes import Rows
from tests.docs.shell import ROOT
from ultrazoo import registry
from ultrazoo.registry import Entry

NAMES = [entry.name for entry in registry.entries("attention") if entry.builtin]


@pytest.fixture(scope="module")
def gallery() -> Iterator[ModuleType]:
    """The hook, imported as mkdocs does it: with its directory on the path."""
    import importlib

    sys.path.insert(0, str(ROOT / "docs" / "_hooks"))
    try:
        yield importlib.import_module("gallery")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def made(gallery: ModuleType) -> dict:
    return {one.name: one for one in gallery.entries()}


def test_everything_built_in_is_there(gallery: ModuleType, made: dict) -> None:
    assert list(made) == NAMES
    page = gallery.page(list(made.values()))
    for name in NAMES:
        assert f"| [{name}](#{name}) |" in page
        assert f"\n## {name}\n" in page


@pytest.mark.parametrize("name", NAMES)
def test_a_section_says_what_describe_says(made: dict, name: str) -> None:
    found = ultrazoo.describe(name, "attention")
    section = made[name].section
    assert f"```text\n{found.formula}\n```" in section
    for words in (
        found.source,
        found.start,
        *found.aliases,
        *found.limits,
        *(f"`{row.name}`" for row in found.options),
    ):
        assert words in section, words
    block = section.rpartition("```yaml\n")[2].removesuffix("```")
    assert yaml.safe_load(block) == found.recipe
    assert ultrazoo.check(yaml.safe_load(block)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_section_has_its_picture(gallery: ModuleType, made: dict, name: str) -> None:
    picture = made[name].picture
    assert picture.startswith(b"\x89PNG")
    assert min(struct.unpack(">II", picture[16:24])) > 100
    assert f"]({gallery.picture_of(name)})" in made[name].section
    assert "*Grid " in made[name].section


def test_what_sees_less_looks_different(made: dict) -> None:
    assert made["swin"].picture != made["full"].picture
    assert "a query may depend on every token" in made["full"].section
    assert "a query may depend on every token" not in made["swin"].section


@dataclass(frozen=True, kw_only=True)
class Added(Rows):
    """A design that the registry has only in the tests below."""

    name: ClassVar[str] = "rows_and_frames"
    source: ClassVar[str] = "arXiv:0000.00000"
    formula: ClassVar[str] = "y = rows + frames"


@dataclass(frozen=True, kw_only=True)
class Silent(Added):
    formula: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class Broken(Added):
    def visible(self, site, queries=None):
        raise IndexError("off by one")


def _with(monkeypatch: pytest.MonkeyPatch, cls: type) -> None:
    row = Entry("attention", Added.name, f"{__name__}:{cls.__name__}", "rows, and frames", ("both",))
    monkeypatch.setattr(
        registry, "_builtins", lambda table=registry._builtins(): {**table, ("attention", row.name): row}
    )


def test_a_new_row_of_the_registry_has_a_section(gallery: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, Added)
    made = gallery._entry(Added.name)
    for words in ("y = rows + frames", "`both`", "needs tuning (arXiv:0000.00000)", "`extra`", "parameters of its own"):
        assert words in made.section, words
    assert made.row.startswith("| [rows_and_frames](#rows_and_frames) | rows, and frames | needs tuning |")


@pytest.mark.parametrize(("cls", "rule"), [(Silent, "has no formula"), (Broken, "off by one")])
def test_a_row_that_fails_is_named(gallery: ModuleType, monkeypatch: pytest.MonkeyPatch, cls: type, rule: str) -> None:
    _with(monkeypatch, cls)
    only = [entry for entry in registry.entries("attention") if entry.name == Added.name]
    monkeypatch.setattr(registry, "entries", lambda *_: only)
    with pytest.raises(RuntimeError, match=rf"gallery: attention 'rows_and_frames': .*{rule}"):
        list(gallery.entries())


def test_the_site_has_a_gallery() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "docs/_hooks/gallery.py" in config
    assert "- Gallery: gallery.md" in config
