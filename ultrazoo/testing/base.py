"""What the parts of the contract suite share: the attributes of the class under test, and the choice of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch import Tensor

from ..spec import AttentionSpec
from .case import Oracle
from .compare import TOLERANCES, assert_close, error_ratio, null_answers
from .scenario import Example, pair_up

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Picked:
    """Which examples a test runs over.

    `first` examples always run, None means all; the others are marked ``proof``. `mark` is put on every one. `of` keeps
    the examples that the test can say something about.
    """

    first: int | None = None
    mark: str = ""
    of: Callable[[Example], bool] | None = None

    def wanted(self, example: Example) -> bool:
        return self.of is None or self.of(example)

    def marks(self, index: int, count: int) -> list[pytest.MarkDecorator]:
        marks = [getattr(pytest.mark, self.mark)] if self.mark else []
        if self.first is not None and index >= self.first:
            marks.append(pytest.mark.proof)
        return marks


def picked(first: int | None = None, mark: str = "", of: Callable[[Example], bool] | None = None) -> Callable[[F], F]:
    """Decorate a contract test with its choice of examples."""

    def decorate(test: F) -> F:
        test.picked = Picked(first, mark, of)  # type: ignore[attr-defined]
        return test

    return decorate


def promises(name: str) -> Callable[[Example], bool]:
    """Examples whose traits say yes to `name` (``extra``, ``key_valid``, ``exact_at_init``)."""
    return lambda example: bool(getattr(example.expanded.traits(), name))


class ContractBase:
    """Attributes of the class under test, set by `contract_suite`."""

    spec_class: ClassVar[type[AttentionSpec]]
    examples: ClassVar[Sequence[Example]] = ()
    oracle: ClassVar[Oracle]
    tolerance: ClassVar[float] = 1.0

    def allowed(self, dtype: torch.dtype, gradient: bool = False) -> float:
        """Largest error ratio against the fp64 oracle in this dtype."""
        row = TOLERANCES[dtype]
        return self.tolerance * (row.gradient if gradient else row.output)

    def assert_answer(self, got: Any, expected: Any, dtype: torch.dtype, *inputs: Tensor) -> None:
        """Compare with the oracle's answer, and prove that the comparison refuses wrong ones."""
        allowed = self.allowed(dtype)
        for name, one, reference in pair_up(got, expected):
            assert bool(torch.isfinite(one).all()), f"{name} is not finite"
            assert_close(name, one, reference, allowed)
            for wrong, answer in null_answers(reference, *inputs).items():
                assert error_ratio(answer, reference) > 3 * allowed, f"the comparison of {name} accepts {wrong}"
