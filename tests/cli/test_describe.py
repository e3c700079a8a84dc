"""`ultrazoo describe`: the options of choices and groups, choices by their own name, what kernels state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import ultrazoo
from tests.cli.program import here
from ultrazoo import catalog, registry
from ultrazoo.attention.parts.rules import RULES
from ultrazoo.attention.parts.selectors import AllSpec
from ultrazoo.catalog import OptionRow
from ultrazoo.options import declared
from ultrazoo.options.declared import groups
from ultrazoo.spec import Options, option

BUILT_IN = [(row.kind, row.name) for row in registry.entries() if row.builtin]


def _table(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the rows below the line that starts with `title`, by the first of them."""
    lines = text.partition(f"\n{title}: ")[2].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells[: cells.index([])]}


def test_choices_have_their_options_below_the_table(capsys):
    text = here(capsys, "describe", "block_sparse").out
    assert "\norder curve: A 3-D space-filling curve.\n" in text
    assert _table(text, "order raster")["block"][0] == "128"
    assert _table(text, "order curve")["curve"][:2] == ["hilbert", "one of hilbert, morton"]
    assert set(_table(text, "order tiles")) == {"tile", "image_tile"}
    assert text.index("\norder raster: ") < text.index("\nlimits\n")
    text = here(capsys, "describe", "pooled").out
    assert _table(text, "rule topp")["floor"][:2] == ["0.0", "a number, 0 ≤ x ≤ 1"]
    assert _table(text, "rule mean_std")["tau"][0] == "1.0"
    assert {"share", "count", "multiple", "soft"} <= set(_table(text, "rule topk"))


def test_groups_inside_mappings_have_theirs(capsys):
    text = here(capsys, "describe", "branched").out
    assert {"layout", "adapt", "coords"} <= set(_table(text, "branches"))
    assert _table(text, "branches.coords")["cell"][:2] == ["centre", "one of index, centre"]
    assert _table(text, "branches.adapt lora")["rank"][:2] == ["64", "a whole number, x ≥ 1"]
    # one that has no options is named all the same
    assert "\nbranches.adapt shared: The host's projections as they are.\n" in text


def test_json_has_the_same(capsys):
    data = json.loads(here(capsys, "describe", "pooled", "--json").out)
    rule = data["options"][0]
    assert [group["name"] for group in rule["groups"]] == list(RULES)
    topp = rule["groups"][1]
    assert topp["summary"] == "The fewest blocks whose softmax mass reaches p."
    assert topp["about"].endswith("A budget's share is another p.")
    assert {row["name"]: row["default"] for row in topp["options"]} == {"p": 0.9, "floor": 0.0, "expected": 0.3}
    assert topp["options"][0]["bounds"] == {"gt": 0, "le": 1}
    data = json.loads(here(capsys, "describe", "branched", "--json").out)
    (branch,) = data["options"][0]["groups"]
    assert branch["name"] == ""
    nested = {row["name"]: [group["name"] for group in row["groups"]] for row in branch["options"]}
    assert (nested["adapt"], nested["coords"], nested["layout"]) == (["shared", "lora", "own"], [""], [])


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_every_option_is_described_at_every_depth(kind, name):
    def compare(rows: tuple[OptionRow, ...], cls: Any) -> None:
        assert [row.name for row in rows] == [row.name for row in declared(cls)]
        for row, of in zip(rows, declared(cls), strict=True):
            assert [group.name for group in row.groups] == [name for name, _ in groups(of)]
            assert row.doc
            for group, (_, inner) in zip(row.groups, groups(of), strict=True):
                assert group.summary.endswith(".")
                compare(group.options, inner)

    compare(ultrazoo.describe(name, kind).options, registry.find(kind, name))


@pytest.mark.parametrize(
    ("name", "kind", "place"),
    [
        ("topk", "rule", "rule of selector pooled"),
        ("mean_std", "rule", "rule of selector pooled"),
        ("raster", "order", "order of attention block_sparse"),
        ("lora", "adapt", "branches.*.adapt of attention branched"),
        ("segment", "proxy", "proxy of attention atlasvid"),
    ],
)
def test_a_choice_is_found_by_its_name(capsys, name, kind, place):
    ran = here(capsys, "describe", name)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"{kind} {name}: ")
    assert f"choice of  {place}\n" in ran.out
    data = json.loads(here(capsys, "describe", name, "--json").out)
    assert (data["kind"], data["of"], data["recipe"]) == (kind, [place], None)
    assert data["options"]
    assert all(row["name"] in ran.out and row["doc"] in ran.out for row in data["options"])
    assert data["about"] in ran.out
    assert here(capsys, "describe", name, "--kind", kind).out == ran.out


def test_a_choice_of_several_parts_names_them_all():
    assert ultrazoo.describe("mlp").of == ("ffn of backbone wan", "ffn of backbone dit")


def test_a_part_comes_before_a_choice_of_its_name(capsys):
    ran = here(capsys, "describe", "pooled")
    assert ran.out.startswith("selector pooled: ")
    assert "also a  proxy (--kind proxy)\n" in ran.out
    ran = here(capsys, "describe", "pooled", "--kind", "proxy")
    assert ran.out.startswith("proxy pooled: ")
    assert "also a     selector (--kind selector)\n" in ran.out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("tpok",), "nothing is called 'tpok'; did you mean 'topk'?"),
        (("topkk", "--kind", "rule"), "unknown rule 'topkk'; did you mean 'topk'?"),
        (("zzz", "--kind", "rule"), "unknown rule 'zzz'; known: mean_std, topk, topk_or_topp, topp"),
        (("topk", "--kind", "selector"), "unknown selector 'topk'"),
        (("topk", "--kind", "ruleset"), "unknown kind 'ruleset'"),
    ],
)
def test_what_is_no_choice(capsys, line, words):
    ran = here(capsys, "describe", *line)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


@dataclass(frozen=True, kw_only=True)
class Raster(Options):
    """Another one."""

    name: ClassVar[str] = "raster"

    grain: int = option(1, "of it", ge=1)


@dataclass(frozen=True, kw_only=True)
class Unsaid(Options):
    name: ClassVar[str] = "unsaid"


@dataclass(frozen=True, kw_only=True)
class Scanned(AllSpec):
    """Every block, one after the other. In no order that matters."""

    name: ClassVar[str] = "acme/scanned"

    scan: Options = option(Raster(), "which way", choices={"raster": Raster, "unsaid": Unsaid})


@dataclass(frozen=True, kw_only=True)
class Ordered(Scanned):
    name: ClassVar[str] = "acme/ordered"

    order: Options = option(Raster(), "which way", choices={"raster": Raster})


@pytest.fixture
def local() -> Iterator[None]:
    for spec in (Scanned, Ordered):
        registry.register(spec)
    yield
    for spec in (Scanned, Ordered):
        registry.forget(spec.kind, spec.name)


@pytest.mark.usefixtures("local")
def test_a_choice_of_several_options_has_to_be_chosen(capsys):
    ran = here(capsys, "describe", "raster")
    assert (ran.code, ran.out) == (2, "")
    kinds = "order_of_attention_block_sparse, scan, order_of_selector_acme/ordered"
    assert f"'raster' is the name of several parts; choose with --kind: {kinds}" in ran.err
    assert "\nAnother one.\n" in here(capsys, "describe", "raster", "--kind", "scan").out
    assert "t-major" in here(capsys, "describe", "raster", "--kind", "order_of_attention_block_sparse").out
    assert ultrazoo.describe("raster", "scan").of == ("scan of selector acme/scanned", "scan of selector acme/ordered")


@pytest.mark.usefixtures("local")
def test_the_docstring_stands_in_for_a_summary(capsys):
    assert here(capsys, "describe", "acme/scanned").out.startswith(
        "selector acme/scanned: Every block, one after the other\n"
    )
    # what dataclasses write where there is none is no docstring
    assert ultrazoo.describe("unsaid").about == ""


@pytest.mark.parametrize("name", [name for kind, name in BUILT_IN if kind == "kernel"])
def test_a_kernel_states_its_facts(capsys, name):
    cls = registry.find("kernel", name)
    data = json.loads(here(capsys, "describe", name, "--kind", "kernel", "--json").out)["kernel"]
    assert data == {
        "devices": list(cls.devices),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in cls.dtypes],
        "head_dims": list(cls.head_dims),
        "head_step": cls.head_step,
        "takes": sorted(cls.takes),
        "needs": sorted(cls.needs),
        "exact": cls.exact,
        "backward": cls.backward,
        "exportable": cls.exportable,
    }
    multiples = f" that {cls.head_step} divides" if cls.head_step > 1 else ""
    text = here(capsys, "describe", name, "--kind", "kernel").out
    for head, words in (
        ("devices", ", ".join(cls.devices)),
        ("dtypes", ", ".join(data["dtypes"])),
        ("head sizes", f"{cls.head_dims[0]} to {cls.head_dims[1]}{multiples}"),
        ("takes", ", ".join(["q, k, v", *data["takes"]])),
        ("result", "exact" if cls.exact else "lossy; runs only by name"),
        ("backward", "yes" if cls.backward else "no"),
        ("exportable", "yes" if cls.exportable else "no"),
    ):
        assert re.search(rf"\n  {head} +{re.escape(words)}\n", text), head


def test_only_kernels_state_facts_of_kernels():
    assert ultrazoo.describe("full").kernel is None
    assert catalog.describe("topk").kernel is None


@pytest.mark.parametrize(("name", "source"), [("pooled", "2505.13389"), ("routed", "2506.23858")])
def test_dynamic_selectors_have_a_source(capsys, name, source):
    assert source in ultrazoo.describe(name).source
    assert f"source  {ultrazoo.describe(name).source}\n" in here(capsys, "describe", name).out


def test_a_part_that_counts_steps_says_how_many(capsys):
    assert ultrazoo.describe("budget").recipe["sampling"] == {"steps": 30}
    assert "sampling" not in ultrazoo.describe("pooled").recipe
