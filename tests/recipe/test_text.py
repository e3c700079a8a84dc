"""YAML in: the scalars of 1.2, lines, and everything that is refused; YAML out: read back unchanged."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrazoo.errors import RecipeError
from ultrazoo.recipe import text
from ultrazoo.recipe.tree import DEEPEST, Map, plain


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("012", "012"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("'3'", "3"),
        ("12", 12),
        ("-3", -3),
        ("0x10", 16),
        ("0o17", 15),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("0-2", "0-2"),
        ("9" * 60, "9" * 60),
    ],
)
def test_scalars_of_yaml_1_2(written: str, meant: object) -> None:
    read = text.read(f"key: {written}", "f")["key"]
    assert read == meant
    assert type(read) is type(meant)


def test_keys_are_text_and_every_entry_has_its_line() -> None:
    tree = text.read("7: a\n\nno: {x: 1,\n  y: [2,\n   3]}\nnull: b\n", "f")
    assert list(tree) == ["7", "no", "null"]
    assert [mark.line for mark in tree.marks.values()] == [1, 3, 6]
    assert tree["no"].marks["y"].line == 4
    assert tree["no"]["y"].marks[1] == ("f", 5)


DEEP = "[" * (DEEPEST + 10) + "]" * (DEEPEST + 10)
ROW = "[x,x,x,x,x,x,x,x,x,x,x,x]"
BOMB = f"a: &a {ROW}\n" + "".join(f"{c}: &{c} {ROW.replace('x', '*' + p)}\n" for p, c in ("ab", "bc", "cd", "de", "ef"))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("a: !!python/object/apply:os.system [echo]", "tags are refused, got !!python/object/apply:os.system"),
        ("a: !!str 1", "tags are refused"),
        ("!mine {a: 1}", "tags are refused"),
        ("!!str a: 1", "tags are refused"),
        ("a: 1\nb: 2\na: 3", "given on line 1 already"),
        ("a: [1", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\tb: 1", "not YAML"),
        ("*: full", "quote it: '*'"),
        ("a: *b", "no anchor &b"),
        ("&a [*a]", "contains itself"),
        ("? [1, 2]\n: 3", "a key is plain text"),
        ("a: &x 1\n? *x\n: 3", "a key is plain text"),
        ("a: &x {b: 1}\n<<: *x", "merge keys"),
        ("a: 1\n---\nb: 2", "one YAML document"),
        ("a: \x00", "not YAML"),
        ("a: \ud800", "not valid Unicode"),
        (DEEP, "nested deeper"),
        (BOMB, "more than 100000 values"),
    ],
)
def test_refused(written: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        text.read(written, "f")
    assert words in str(caught.value)
    assert all(problem.file == "f" for problem in caught.value.problems)


def test_several_structural_problems_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        text.read("a: !x 1\na: 2\nb: {c: 1, c: 2}", "f")
    assert [(p.path, p.line) for p in caught.value.problems] == [("a", 1), ("a", 2), ("b.c", 3)]


def test_aliases_are_copies() -> None:
    tree = text.read("a: &x {k: [1]}\nb: *x\n", "f")
    tree["b"]["k"].append(2)
    assert plain(tree) == {"a": {"k": [1]}, "b": {"k": [1, 2]}}


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
    | st.sampled_from(
        ["no", "012", "1e-4", "0o7", "~", "null", "true", ".5", "*", "<<", "=", "a: b", "#", "1_0", " x "]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab-*.,/7 no", max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(plain_data)
def test_what_is_written_is_read_back(data: object) -> None:
    assert plain(text.read(text.write({"data": data}), "f")) == {"data": data}


@given(st.text(max_size=80) | st.text("ab:{}[]&*!-?|>'\"\n #,%@`<", max_size=40))
def test_any_text_is_a_tree_or_a_recipe_error(written: str) -> None:
    try:
        read, found = text.read(written, "f"), ()
    except RecipeError as error:
        read, found = None, error.problems
    assert found or isinstance(read, (Map, list, str, int, float, bool, type(None)))
