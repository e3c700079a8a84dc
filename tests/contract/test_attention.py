"""The contract suite over every attention that ships: one class each, with the oracle of the same name."""

from __future__ import annotations

import importlib

from ultrazoo import registry
from ultrazoo.testing import contract_suite

NAMES = sorted(row.name for row in registry.entries("attention") if row.builtin)

for _name in NAMES:
    _oracle = getattr(importlib.import_module(f"tests.oracles.{_name}"), _name)
    _title = "".join(part.capitalize() for part in _name.split("_"))
    globals()[f"Test{_title}"] = contract_suite(_name, oracle=_oracle)


def test_every_attention_is_here() -> None:
    tested = {value.spec_class.name for value in globals().values() if hasattr(value, "spec_class")}
    assert tested == set(NAMES)
    assert {"full", "original", "by_head", "branched", "ultragen"} <= tested
