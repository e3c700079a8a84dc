"""A plan made from closed-form specs, with the attributes that analysis and report read."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.cost.fakes import Rows, Sampler, Share, Toy
from ultrazoo.cost import Priced, price
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Video


@dataclass(frozen=True)
class FakePlan:
    name: str
    grid: Grid
    resolved: Any
    priced: Priced
    hash: str = "0123456789abcdef" * 4
    steps: tuple = field(default=())

    def __getattr__(self, name: str) -> Any:
        if name in ("layers", "totals", "clip", "fits", "seconds", "memory"):
            return getattr(self.priced, name)
        raise AttributeError(name)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "recipe": self.resolved.data()}


def fake_plan(
    name: str = "toy",
    grid: Grid = Grid(3, 10, 14),
    attention: tuple[AttentionSpec, ...] | None = None,
    **changes: Any,
) -> FakePlan:
    attention = attention or (Share(), Rows(), Share(), Rows())
    backbone = Toy(dim=8, heads=2, depth=len(attention))
    sampling = changes.pop("sampling", Sampler(30, 5.0))
    dtype = changes.pop("dtype", "bfloat16")
    sites = backbone.sites(grid)
    facts = {
        "name": name,
        "summary": "a toy that alternates",
        "source": "arXiv:0000.00000",
        "backbone": backbone,
        "video": Video(grid=grid),
        "grid": grid,
        "sampling": sampling,
        "sites": sites,
        "attention": attention,
        "written": attention,
        "steps": (),
        "weights": None,
        "dtype": dtype,
        "seed": 0,
        "search": {},
        "plugins": (),
        "hash": "0123456789abcdef" * 4,
    } | changes
    resolved = SimpleNamespace(**facts, data=lambda: {"schema": 1, "name": name, "summary": facts["summary"]})
    priced = price(backbone, sites, attention, grid=grid, sampling=sampling, dtype=dtype)
    return FakePlan(name, grid, resolved, priced)
