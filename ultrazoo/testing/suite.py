"""`contract_suite`: every promise that an attention makes, as one pytest class.

::

    TestMine = contract_suite("vendor/name", oracle=my_oracle)

runs over the examples of the registered attention: against the oracle in outputs and gradients, locality, batch and
padding invariance, counts, life cycle, compilation and export. Only pytest is needed beside ultrazoo.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .. import registry
from ..spec import AttentionSpec
from .accounting import Accounting
from .base import ContractBase, Picked
from .case import Oracle
from .lifecycle import LifeCycle
from .locality import Locality
from .numerics import Numerics
from .poison import poisoned_memory, restored_state
from .scenario import examples_of
from .tracing import Tracing

_MARKERS = {
    "gpu": "needs a GPU; skipped with a reason where there is none",
    "proof": "part of the full matrix of expensive proofs",
}


class ContractSuite(Numerics, Locality, Accounting, LifeCycle, Tracing):
    """All parts of the contract. `contract_suite` makes the subclass that pytest collects."""

    __test__ = False

    @pytest.fixture(autouse=True)
    def _clean_room(self) -> Iterator[None]:
        """A fixed seed, the default dtype put back, NaN in memory that the attention's package leaves uninitialised."""
        package = self.spec_class.__module__.partition(".")[0]
        with restored_state(seed=0), poisoned_memory("ultrazoo", package):
            yield

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per example. Dear tests take a few examples; the others are marked ``proof``."""
        if "example" not in metafunc.fixturenames:
            return
        for marker, meaning in _MARKERS.items():
            metafunc.config.addinivalue_line("markers", f"{marker}: {meaning}")
        picked: Picked = getattr(metafunc.function, "picked", Picked())
        examples = [e for e in self.examples if picked.wanted(e)]
        metafunc.parametrize(
            "example",
            [pytest.param(e, marks=picked.marks(i, len(examples)), id=e.label) for i, e in enumerate(examples)],
        )


def contract_suite(
    name: str | type[AttentionSpec],
    *,
    oracle: Oracle,
    tolerance: float = 1.0,
    **attributes: Any,
) -> type[ContractSuite]:
    """The contract of one attention as a test class; bind it to a module-level name that starts with ``Test``.

    name: a registered name, or a spec class that is not registered. oracle: `Case` → what the attention must answer, in
    fp64, written from the formula. tolerance: factor on the table of tolerances, for designs that are lossy by nature.
    attributes: replace attributes or methods of the class; ``export_examples=2`` exports two examples instead of one.

    Raises RegistryError for a name that nobody registered, ValueError when the attention offers no examples.
    """
    spec_class = registry.find("attention", name) if isinstance(name, str) else name
    examples = examples_of(spec_class)
    if not examples:
        raise ValueError(f"{spec_class.__name__}.examples() is empty: there is nothing to test")
    body = {
        "__test__": True,
        "__doc__": f"The contract of attention {spec_class.name!r}.",
        "__module__": __name__,
        "spec_class": spec_class,
        "examples": examples,
        "oracle": staticmethod(oracle),
        "tolerance": tolerance,
        **attributes,
    }
    title = "".join(part.capitalize() for part in spec_class.name.replace("/", "_").replace("-", "_").split("_"))
    return type(f"Test{title}Contract", (ContractSuite,), body)


__all__ = ["ContractBase", "ContractSuite", "contract_suite"]
