"""Every form of every attention that claims a target, exported to it inside both native backbones and proved there.

`make proof` proves all pairs and writes the table; `make test` proves one form of each attention for the cheapest target,
proves a tenth of the other pairs again, another one every day, and finds pairs that the table lacks or that are gone.
"""

from __future__ import annotations

import datetime as dt
import os
import re

import pytest

import ultrazoo
from tests.export import table
from tests.export.cases import Case, cases
from tests.export.proving import prove
from ultrazoo import registry
from ultrazoo.export.proof import ALLOWED, one_process
from ultrazoo.export.targets import target as find_target

PAIRS = [(case, target) for case in cases() for target in case.targets]
CHEAP = "torchscript"
TENTH = 10


def _first_forms() -> list[Case]:
    """One case of each attention."""
    found: dict[str, Case] = {}
    for case in cases():
        found.setdefault(case.attention, case)
    return list(found.values())


def _today() -> list[tuple[Case, str]]:
    """The tenth of the pairs that is due: by the day, so that ten days prove all; ULTRAZOO_PROOF_DAY asks for another."""
    day = int(os.environ.get("ULTRAZOO_PROOF_DAY", dt.datetime.now(dt.UTC).date().toordinal()))
    return PAIRS[day % TENTH :: TENTH]


def _named(pairs: list[tuple[Case, str]]) -> list[object]:
    return [pytest.param(case, target, id=f"{case.id}-{target}") for case, target in pairs]


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with one_process():
        yield


@pytest.mark.proof
@pytest.mark.parametrize(("case", "target"), _named(PAIRS))
def test_every_claim_is_proved(case, target, tmp_path):
    table.keep(case.id, target, None)
    row = prove(case, target, tmp_path / "made")
    assert row["worst"] <= ALLOWED["float32"]
    table.keep(case.id, target, row)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in _first_forms()])
def test_one_form_of_each_attention_is_proved(case, tmp_path):
    row = prove(case, CHEAP, tmp_path / "made")
    assert row["worst"] <= ALLOWED["float32"]


@pytest.mark.parametrize(("case", "target"), _named(_today()))
def test_the_tenth_of_the_day_is_proved_again(case, target, tmp_path):
    if why := find_target(target).absent():
        pytest.skip(why)
    row, known = prove(case, target, tmp_path / "made"), table.read()[case.id, target]
    assert row["hash"] == known["hash"]
    assert row["ragged"] == known["ragged"]
    if row["torch"] == known["torch"]:
        assert row["kernels"] == known["kernels"]


def test_the_table_holds_what_the_registry_claims():
    rows = table.read()
    due = {(case.id, target): ultrazoo.plan(case.recipe(target)).hash for case, target in PAIRS}
    lacking = sorted(due.keys() - rows.keys())
    assert not lacking, f"claimed and not proved: {lacking}; run make proof, or claim less in the traits"
    gone = sorted(rows.keys() - due.keys())
    assert not gone, f"proved once and claimed no more: {gone}; take them out of {table.PLACE.name}"
    stale = sorted(key for key, row in rows.items() if row["hash"] != due[key])
    assert not stale, f"proved with another recipe: {stale}; run make proof"


def test_rows_of_the_table_hold():
    for key, row in table.read().items():
        assert 0 <= row["ratio"] <= row["worst"] <= ALLOWED["float32"], key
        t, h, w = row["ragged"]
        assert len({t, h, w}) == 3, key
        assert all(size == 1 or all(size % n for n in range(2, size)) for size in (t, h, w)), key


def test_every_attention_that_claims_a_target_is_in_the_matrix_in_both_backbones():
    found = {(case.attention, case.backbone) for case in cases()}
    claiming = set()
    for row in registry.entries("attention"):
        if row.builtin:
            examples = registry.find("attention", row.name).examples()
            if any(spec.traits().export for spec, _ in examples):
                claiming.add(row.name)
    assert found == {(name, backbone) for name in claiming for backbone in ("wan", "dit")}


def test_names_of_cases_are_unique_and_plain():
    names = [case.id for case in cases()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+/(wan|dit)", name) for name in names)
