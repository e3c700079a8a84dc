"""What an option takes, in words: they say which part of it may be null, and what the items of a list are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ultrazoo import registry
from ultrazoo.grid import Grid
from ultrazoo.options import declared, expected, parse_part
from ultrazoo.options.declared import groups, named, words
from ultrazoo.spec import Options, option

Width = int | Literal["full"]
Box = tuple[Width, Width, Width]


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (int | None, "a whole number or null"),
        (tuple[int, ...], "a list of whole numbers"),
        (tuple[int, ...] | None, "a list of whole numbers, or null"),
        (None | tuple[int, int], "a list of 2 whole numbers, or null"),
        (tuple[float, ...] | None, "a list of numbers, or null"),
        (Mapping[str, float] | None, "a mapping of names to numbers, or null"),
        (int | tuple[int, ...], "a whole number or a list of whole numbers"),
        (int | tuple[int, ...] | None, "a whole number, a list of whole numbers, or null"),
        (int | tuple[int, int] | tuple[int, int, int], "a whole number or a list of 2 or 3 whole numbers"),
        (tuple[bool, ...], "a list (each true or false)"),
        (Mapping[str, bool] | None, "a mapping of names to values (each true or false), or null"),
        (tuple[Literal["a", "b"], ...], "a list (each one of a, b)"),
        (tuple[tuple[int, ...], ...], "a list (each a list of whole numbers)"),
        (tuple[int, str], "a list of 2"),
        (Width, "a whole number or full"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (Width | tuple[Width, ...], "a whole number, full or a list of these"),
        (
            Box | tuple[Box, ...] | Mapping[str, Box],
            "a list of 3 (each a whole number or full), a list of such lists, or a mapping of names to such lists",
        ),
        (Grid | None, "a grid [T, H, W] or [H, W] of positive whole numbers or null"),
    ],
)
def test_words(annotation: Any, said: str) -> None:
    assert words(annotation) == said


@pytest.mark.parametrize(
    ("kind", "name", "row", "said"),
    [
        ("attention", "mixture_of_blocks", "top", "a list of whole numbers, or null"),
        ("attention", "nabla", "window", "a list of whole numbers, or null"),
        ("selector", "budget", "heads", "a list of numbers, or null"),
        ("selector", "budget", "steps", "a mapping of names to numbers, or null"),
        ("layout", "windows", "counts", "a whole number, a list of whole numbers, or null"),
        ("attention", "by_head", "groups", "a mapping of names to attentions"),
        ("attention", "branched", "branches", "a mapping of names to mappings of options"),
        ("selector", "union", "of", "a list of selectors"),
    ],
)
def test_words_of_parts(kind: str, name: str, row: str, said: str) -> None:
    assert {one.name: expected(one) for one in declared(registry.find(kind, name))}[row] == said


def test_an_error_message_can_be_read() -> None:
    problem = parse_part("attention", {"name": "sliding_tile", "window": [3, 3]})[1][0]
    lists = "a list of 3 (each a whole number or full), a list of such lists, or a mapping of names to such lists"
    assert problem.rule == f"expected {lists}, got [3, 3]"


def _everything(cls: Any) -> Iterator[Any]:
    for row in declared(cls):
        yield row
        for _, group in groups(row):
            yield from _everything(group)


def test_docs_of_options_speak_of_null() -> None:
    """None is Python's; a recipe says null."""
    parts = [(row.kind, row.name) for row in registry.entries() if row.builtin and row.kind != "kernel"]
    rows = [(name, row) for kind, name in parts for row in _everything(registry.find(kind, name))]
    assert len(rows) > 100
    assert [f"{name}.{row.name}: {row.doc}" for name, row in rows if "None" in row.doc] == []


@dataclass(frozen=True, kw_only=True)
class Inner(Options):
    width: int = option(1, "tokens")


@dataclass(frozen=True, kw_only=True)
class Outer(Options):
    plain: int = option(1, "none")
    one: Inner | None = option(None, "one")
    many: Mapping[str, Inner] = option(doc="many")
    picked: Options = option(Inner(), "picked", choices={"inner": Inner})
    part: Options = option(Inner(), "a part", kind="layout")


def test_groups_of_options() -> None:
    rows = {row.name: row for row in declared(Outer)}
    assert [groups(row) for row in rows.values()] == [(), (("", Inner),), (("", Inner),), (("inner", Inner),), ()]
    assert [name for name, row in rows.items() if named(row.annotation)] == ["many"]
