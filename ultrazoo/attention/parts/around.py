"""Selectors around a selector: what they hand on to the one inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import Problem
from ...spec import Site, option
from .orders import Place
from .selectors import Bounds, SelectorSpec


@dataclass(frozen=True, kw_only=True)
class AroundSpec(SelectorSpec):
    """A selector that changes when or how much the selector `of` chooses; whatever it does not say is that selector's."""

    of: SelectorSpec = option(doc="the selector inside", kind="selector")

    @property
    def is_static(self) -> bool:
        return False

    @property
    def by_layer(self) -> bool:
        return self.of.by_layer

    def phase(self, step: int) -> Any:
        return self.of.phase(step)

    def problems(self, site: Site) -> list[Problem]:
        return [problem.under("of") for problem in self.of.problems(site)]

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        return [problem.under("of") for problem in self.of.place_problems(place, site)]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        return self.of.bounds(place, site, keep)

    def flops(self, place: Place, site: Site) -> int:
        return self.of.flops(place, site)

    def parameters(self, site: Site) -> int:
        return self.of.parameters(site)

    def kept_bytes(self, place: Place, site: Site) -> int:
        return self.of.kept_bytes(place, site)

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"of.{name}" for name in self.of.frozen())

    def keeps_all(self) -> bool:
        return self.of.keeps_all()
