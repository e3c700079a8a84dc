"""Options: plain data to typed specs and back; every wrong value a problem with its path."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrazoo import registry
from ultrazoo.grid import Grid
from ultrazoo.options import FrozenMap, declared, expected, parse, parse_part, to_data
from ultrazoo.spec import AttentionSpec, BackboneSpec, Options, Spec, Tree, option


@dataclass(frozen=True, kw_only=True)
class Shared(Options):
    name: ClassVar[str] = "shared"


@dataclass(frozen=True, kw_only=True)
class Lora(Options):
    name: ClassVar[str] = "lora"
    rank: int = option(doc="rank", ge=1)


@dataclass(frozen=True, kw_only=True)
class Coords(Options):
    origin: Literal["grid", "window"] = "grid"
    scale: float = option(1.0, gt=0, lt=8)


@dataclass(frozen=True, kw_only=True)
class Tiles(Spec):
    kind: ClassVar[str] = "layout"
    name: ClassVar[str] = "acme/tiles"
    counts: int | tuple[int, int] | tuple[int, int, int] = option(2, ge=1)
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Branch(Options):
    layout: Spec = option(Tiles(), kind="layout")
    adapt: Options = option(Shared(), choices={"shared": Shared, "lora": Lora})
    coords: Coords = option(Coords())


@dataclass(frozen=True, kw_only=True)
class Everything(AttentionSpec):
    name: ClassVar[str] = "acme/everything"
    branches: Mapping[str, Branch] = option(doc="branches by name")
    order: Tree = None
    weights: Mapping[str, float] | None = None
    flag: bool = False
    text: str = "plain"
    grid: Grid | None = None
    kernel: str = option("auto", kind="kernel")
    inner: AttentionSpec | None = option(None, kind="attention")
    either: int | Literal["all"] = 3

    def __post_init__(self) -> None:
        if self.text == self.kernel:
            raise ValueError("text and kernel must differ")


@dataclass(frozen=True, kw_only=True)
class Sized(BackboneSpec):
    name: ClassVar[str] = "acme/sized"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"big": {"dim": 8}}
    dim: int = option(doc="channels", ge=1)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    specs = (Tiles, Everything, Sized)
    for spec in specs:
        registry.register(spec)
    yield
    for spec in specs:
        registry.forget(spec.kind, spec.name)


def everything(**options: Any) -> dict[str, Any]:
    return {"name": "acme/everything", "branches": {}, **options}


GOOD = everything(
    branches={
        "a": {"layout": {"name": "acme/tiles", "counts": [1, 2, 3], "sizes": [4]}, "adapt": {"name": "lora", "rank": 3}}
    },
    order=["a", ["b", "c"]],
    weights={"a": 1, "b": 0.5},
    flag=True,
    grid=[2, 3],
    kernel="math",
    inner="full",
    either="all",
)


def test_data_becomes_typed_and_goes_back() -> None:
    spec, problems = parse_part("attention", GOOD)
    assert problems == []
    assert spec.branches["a"].layout == Tiles(counts=(1, 2, 3), sizes=(4,))
    assert spec.order == ("a", ("b", "c"))
    assert spec.grid == Grid(1, 2, 3)
    assert isinstance(spec.weights["a"], float)
    again, problems = parse_part("attention", to_data(spec))
    assert (again, problems) == (spec, [])
    assert hash(again) == hash(spec)


def test_canonical_data_leaves_defaults_out_and_puts_names_first() -> None:
    spec, _ = parse_part(
        "attention", everything(branches={"a": {"adapt": "shared", "coords": {"scale": 1}}}, flag=False)
    )
    assert to_data(spec) == {"name": "acme/everything", "branches": {"a": {}}}
    assert next(iter(to_data(parse_part("attention", {"flag": True, **everything()})[0]))) == "name"
    # True equals 1 in Python, not in a recipe
    assert to_data(Everything(branches={}, either=True))["either"] is True


def test_specs_in_data_are_taken_as_they_are() -> None:
    assert parse_part("layout", Tiles(counts=3)) == (Tiles(counts=3), [])
    assert "expected an attention, got the layout" in parse_part("attention", Tiles())[1][0].rule


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ({"fleg": True}, "fleg", "did you mean 'flag'?"),
        ({"zzz": True}, "zzz", "options are branches, order"),
        ({"flag": 1}, "flag", "expected true or false, got 1"),
        ({"flag": "no"}, "flag", 'expected true or false, got "no"'),
        ({"flag": None}, "flag", "expected true or false, got null"),
        ({"text": 3}, "text", "expected text, got 3"),
        ({"text": "auto"}, "", "text and kernel must differ"),
        ({"grid": [1, 2, 3, 4]}, "grid", "expected a grid"),
        ({"grid": 3}, "grid", "expected a grid"),
        ({"kernel": "mat"}, "kernel", "did you mean 'math'?"),
        ({"kernel": 3}, "kernel", "expected the name of a kernel"),
        ({"inner": "ful"}, "inner", "did you mean 'full'?"),
        ({"inner": 3}, "inner", "expected an attention"),
        ({"either": "some"}, "either", "expected a whole number or all"),
        ({"either": True}, "either", "expected a whole number or all, got true"),
        ({"order": []}, "order", "nested list of names"),
        ({"order": ["a", 3]}, "order.1", "nested list of names"),
        ({"weights": {"a": "x"}}, "weights.a", "expected a number"),
        ({"weights": {"a": math.nan}}, "weights.a", "finite"),
        ({"weights": {"a": 10**400}}, "weights.a", "finite"),
        ({"weights": {3: 1.0}}, "weights.3", "names are text"),
        ({"weights": [1]}, "weights", "expected a mapping of names to numbers, or null, got [1]"),
        ({"branches": {"a": None}}, "branches.a", "expected a mapping with the options of 'a'"),
        (
            {"branches": {"a": {"layout": {"name": "acme/tiles", "cuonts": 3}}}},
            "branches.a.layout.cuonts",
            "unknown option of layout 'acme/tiles'; did you mean 'counts'?",
        ),
        (
            {"branches": {"a": {"layout": {"name": "acme/tiles", "counts": [1]}}}},
            "branches.a.layout.counts",
            "a whole number or a list of 2 or 3 whole numbers, got [1]",
        ),
        (
            {"branches": {"a": {"layout": {"name": "acme/tiles", "counts": [1, 0]}}}},
            "branches.a.layout.counts",
            "at least 1, got [1, 0]",
        ),
        ({"branches": {"a": {"layout": {"name": "acme/tiles", "counts": 1.0}}}}, "branches.a.layout.counts", "got 1.0"),
        ({"branches": {"a": {"layout": {}}}}, "branches.a.layout", "this layout has no 'name'"),
        (
            {"branches": {"a": {"adapt": {"name": "lora"}}}},
            "branches.a.adapt.rank",
            "adapt 'lora' needs the option 'rank'; give a whole number: rank",
        ),
        ({"branches": {"a": {"adapt": {"rank": 3}}}}, "branches.a.adapt", "'adapt' has no 'name'"),
        ({"branches": {"a": {"adapt": "sharde"}}}, "branches.a.adapt", "did you mean 'shared'?"),
        ({"branches": {"a": {"adapt": 3}}}, "branches.a.adapt", "expected one of shared, lora"),
        ({"branches": {"a": {"coords": {"origin": "gridd"}}}}, "branches.a.coords.origin", "did you mean 'grid'?"),
        ({"branches": {"a": {"coords": {"scale": 0}}}}, "branches.a.coords.scale", "more than 0"),
        ({"branches": {"a": {"coords": {"scale": 8}}}}, "branches.a.coords.scale", "less than 8"),
        ({"branches": {"a": {"coords": []}}}, "branches.a.coords", "expected a mapping"),
    ],
)
def test_wrong_values(options: dict[str, Any], path: str, words: str) -> None:
    spec, problems = parse_part("attention", everything(**options))
    assert spec is None
    assert [problem.path for problem in problems] == [path]
    assert words in str(problems[0])


def test_everything_wrong_is_listed() -> None:
    bad = everything(flag=3, text=3, branches={"a": {"lay": 1, "adapt": 2}, "b": {"coords": 3}})
    found = parse_part("attention", bad, "attention.*")[1]
    assert sorted(problem.path for problem in found) == [
        "attention.*.branches.a.adapt",
        "attention.*.branches.a.lay",
        "attention.*.branches.b.coords",
        "attention.*.flag",
        "attention.*.text",
    ]


def test_a_missing_option_says_what_is_due() -> None:
    problem = parse_part("attention", {"name": "acme/everything"})[1][0]
    assert (problem.path, problem.rule) == ("branches", "attention 'acme/everything' needs the option 'branches'")


def test_presets_are_spread_below_what_is_given() -> None:
    assert parse_part("backbone", {"name": "acme/sized", "preset": "big"})[0] == Sized(dim=8)
    assert parse_part("backbone", {"name": "acme/sized", "preset": "big", "dim": 3})[0] == Sized(dim=3)
    assert (
        "'xl_2' is a preset of backbone 'dit'"
        in parse_part("backbone", {"name": "acme/sized", "preset": "xl_2"})[1][0].rule
    )
    assert "did you mean 'big'?" in str(parse_part("backbone", {"name": "acme/sized", "preset": "bg"})[1][0])


def test_frozen_maps_are_dicts_that_stay_as_they_are() -> None:
    frozen = FrozenMap({"a": 1, "b": (2,)})
    assert frozen == {"b": (2,), "a": 1}
    assert hash(frozen) == hash(FrozenMap({"b": (2,), "a": 1}))
    assert pickle.loads(pickle.dumps(frozen)) == copy.deepcopy(frozen) == copy.copy(frozen) == frozen
    for change in (
        lambda: frozen.update(a=2),
        lambda: frozen.__setitem__("a", 2),
        lambda: frozen.pop("a"),
        lambda: frozen.setdefault("c", 1),
    ):
        with pytest.raises(TypeError, match="frozen"):
            change()


def test_declared_rows_describe_the_class() -> None:
    rows = {row.name: row for row in declared(Everything)}
    assert rows["branches"].required
    assert expected(rows["inner"]) == "an attention or null"
    assert {row.name: expected(row) for row in declared(Branch)}["adapt"] == "one of shared, lora"
    assert expected(declared(Tiles)[0]) == "a whole number or a list of 2 or 3 whole numbers"


@dataclass(frozen=True, kw_only=True)
class Odd(Options):
    thing: set[int] = frozenset()  # type: ignore[assignment]


def test_an_annotation_that_no_option_can_have_is_our_bug() -> None:
    with pytest.raises(TypeError, match="cannot be annotated"):
        parse(Odd, {"thing": {1}})


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-3, 3)
        | st.floats()
        | st.sampled_from(["a", "lora", "full", "acme/tiles"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "name",
                        "branches",
                        "layout",
                        "adapt",
                        "coords",
                        "rank",
                        "counts",
                        "order",
                        "weights",
                        "inner",
                        "a",
                        "grid",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=10,
    )
)
def test_any_data_is_parsed_or_has_problems(data: Any) -> None:
    wrapped = {**data, "name": "acme/everything"} if isinstance(data, dict) else data
    spec, problems = parse_part("attention", wrapped)
    assert (spec is None) == bool(problems)
    if spec is not None:
        assert parse_part("attention", to_data(spec)) == (spec, [])
