"""A plan: what a recipe stands for, with its price. Data to look at, to compare and to save; nothing is built here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import cost, tuned
from ..cost import Clip, Fit, LayerPlan, Priced, Seconds, Totals
from ..grid import Grid
from .resolved import SCHEMA, Resolved


@dataclass(frozen=True)
class Plan:
    """A resolved recipe and everything the cost model says about it. Forward figures are for batch 1."""

    resolved: Resolved
    priced: Priced

    @property
    def name(self) -> str:
        return self.resolved.name

    @property
    def hash(self) -> str:
        return self.resolved.hash

    @property
    def grid(self) -> Grid:
        return self.resolved.grid

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        return self.priced.layers

    @property
    def totals(self) -> Totals:
        return self.priced.totals

    @property
    def clip(self) -> Clip:
        return self.priced.clip

    @property
    def fits(self) -> tuple[Fit, ...]:
        return self.priced.fits

    @property
    def seconds(self) -> tuple[Seconds, ...]:
        return self.priced.seconds

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: the contents of ``plan.json``."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "hash": self.hash,
            "grid": list(self.grid),
            "tokens": self.grid.tokens,
            "layers": [layer.data() for layer in self.layers],
            "totals": self.totals.data(),
            "clip": self.clip.data(),
            "fits": [fit.data() for fit in self.fits],
            "plugins": [dict(row) for row in self.resolved.plugins],
            "kernels": tuned.summary(),
            "recipe": self.resolved.data(),
        }


def make_plan(resolved: Resolved) -> Plan:
    """Price a resolved recipe."""
    priced = cost.price(
        resolved.backbone,
        resolved.sites,
        resolved.attention,
        grid=resolved.grid,
        steps=resolved.steps,
        sampling=resolved.sampling,
        dtype=resolved.dtype,
        written=resolved.written,
    )
    return Plan(resolved, priced)
