"""A step schedule exports one phase per file: the steps between which no layer changes its attention."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..attention.scheduled import Scheduled
from ..errors import UsageError


def phases_of(plan: Any) -> list[tuple[int, int]]:
    """The phases (first, last step) of a plan, in order; none for a recipe without steps. The last one ends with the
    sampling steps of the recipe, or with the last step that the recipe names."""
    ranges = plan.resolved.steps
    if not ranges:
        return []
    sampling = plan.resolved.sampling
    end = max([one.last + 1 for one in ranges] + ([sampling.steps] if sampling is not None else []))
    borders = sorted({0, end, *(one.first for one in ranges), *(one.last + 1 for one in ranges)})
    return [(first, after - 1) for first, after in itertools.pairwise(borders)]


def phase_wanted(plan: Any, wanted: str | None) -> tuple[int, int] | None:
    """The phase that `wanted` names, as ``0-11`` or by any step in it. Raises UsageError that lists them."""
    found = phases_of(plan)
    listed = ", ".join(f"{first}-{last}" for first, last in found)
    if not found:
        if wanted is not None:
            raise UsageError(f"--phase {wanted}: {plan.name} has no steps, so there is one phase; leave --phase out")
        return None
    if wanted is None:
        raise UsageError(f"{plan.name} has other attention at some steps: export one phase, --phase one of {listed}")
    for first, last in found:
        if wanted == f"{first}-{last}" or (wanted.isdecimal() and first <= int(wanted) <= last):
            return first, last
    raise UsageError(f"--phase {wanted}: the phases of {plan.name} are {listed}")


@contextlib.contextmanager
def one_phase(model: nn.Module, phase: tuple[int, int] | None) -> Iterator[None]:
    """Inside the ``with`` block `model` has the attentions of one phase alone in place of the schedules; None: as it is."""
    replaced = []
    for module in list(model.modules()) if phase is not None else ():
        for name, child in list(module.named_children()):
            if isinstance(child, Scheduled):
                assert phase is not None
                setattr(module, name, child.chosen((phase[0], phase[1] + 1)))
                replaced.append((module, name, child))
    try:
        yield
    finally:
        for module, name, child in replaced:
            setattr(module, name, child)
