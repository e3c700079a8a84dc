"""The page of export proofs is the committed table's, and refuses a claim that nothing proves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.docs.shell import ROOT
from tests.export import table
from ultrazoo import registry
from ultrazoo.ports import EXPORTS


@pytest.fixture(scope="module")
def exports() -> Iterator[ModuleType]:
    """The hook, imported as mkdocs does it: with its directory on the path."""
    import importlib

    sys.path.insert(0, str(ROOT / "docs" / "_hooks"))
    try:
        yield importlib.import_module("exports")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(table.read().values())


def test_every_proved_case_and_attention_has_its_line(exports, rows):
    lines = exports.page(rows).splitlines()
    for case in {row["case"] for row in rows}:
        attention, form, backbone = case.split("/")
        assert sum(line.startswith(f"| {attention} | {form} | {backbone} |") for line in lines) == 1, case
        assert sum(line.startswith(f"| [{attention}](gallery.md#{attention}) |") for line in lines) == 1
    assert all(sum(line.startswith(f"| {target} |") for line in lines) == 1 for target in EXPORTS)


def test_the_largest_ratio_of_an_attention_is_shown(exports, rows):
    linear = [row for row in rows if row["target"] == "pt2" and row["case"].startswith("linear/")]
    worst = max(linear, key=lambda row: row["ratio"])
    cell = f"{len(linear)}: {worst['ratio']:.0e}"

    def shown() -> str:
        (line,) = (line for line in exports.page(rows).splitlines() if line.startswith("| [linear]"))
        return line.split("|")[2 + EXPORTS.index("pt2")].strip()

    assert shown() == cell
    worst["ratio"] *= 50
    assert shown() != cell
    worst["ratio"] /= 50


def test_a_claim_that_nothing_proves_stops_the_build(exports, rows):
    without = [row for row in rows if row["target"] != "onnx" or not row["case"].startswith("swin/")]
    with pytest.raises(RuntimeError, match="'swin' claims onnx"):
        exports.page(without)


def test_what_claims_nothing_is_not_there(exports, rows):
    silent = [
        row.name
        for row in registry.entries("attention")
        if row.builtin and not any(spec.traits().export for spec, _ in registry.find("attention", row.name).examples())
    ]
    assert silent
    assert not any(f"[{name}]" in exports.page(rows) for name in silent)
