"""The page of parts, made from the registry: what kernels state, and the options of choices."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.docs.shell import ROOT
from ultrazoo import registry


@pytest.fixture(scope="module")
def generated() -> Iterator[ModuleType]:
    """The hook, imported as mkdocs does it: with its directory on the path."""
    sys.path.insert(0, str(ROOT / "docs" / "_hooks"))
    try:
        yield importlib.import_module("generated")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def sections(generated: ModuleType) -> dict[str, str]:
    """Sections of the page by ``kind name``."""
    found = {}
    for part in generated.parts().split("\n## ")[1:]:
        kind, _, rest = part.partition("\n")
        for section in rest.split("\n### ")[1:]:
            name, _, body = section.partition("\n")
            found[f"{kind} {name}"] = body
    return found


@pytest.mark.parametrize("name", [row.name for row in registry.entries("kernel") if row.builtin])
def test_a_kernel_states_its_facts(sections: dict[str, str], name: str) -> None:
    cls, body = registry.find("kernel", name), sections[f"kernel {name}"]
    for line in (
        f"- devices: {', '.join(cls.devices)}",
        f"- head sizes: {cls.head_dims[0]} to {cls.head_dims[1]}",
        f"- result: {'exact' if cls.exact else 'lossy'}",
        f"- backward: {'yes' if cls.backward else 'no'}",
        f"- exportable: {'yes' if cls.exportable else 'no'}",
    ):
        assert f"\n{line}" in body
    assert "bfloat16" in body
    assert all(word in body for word in (*cls.takes, *cls.needs))


def test_choices_and_groups_have_tables(sections: dict[str, str]) -> None:
    body = sections["attention block_sparse"]
    assert "\n`order: curve`: A 3-D space-filling curve.\n" in body
    assert "\n| `curve` | one of hilbert, morton | `hilbert` | which one |\n" in body
    body = sections["attention branched"]
    assert "\n`branches.coords`: Places of tokens" in body
    assert "\n`branches.adapt: lora`: " in body
    # a choice without options is there as well
    assert "\n`branches.adapt: shared`: The host's projections as they are." in body
