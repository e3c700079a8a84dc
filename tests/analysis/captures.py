"""Captures of made-up queries, keys and values, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ultrazoo.analysis.capture_files import Capture, Item, ModelFacts, item_name, write_tensors
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Segment, Site

SITE = Site(dim=24, heads=3, head_dim=8, layers=4, rope=Rope(axes=(4, 2, 2)), qk_norm=True)


def made_capture(
    place: Path,
    grid: Grid = Grid(3, 4, 5),
    layers: tuple[int, ...] = (1,),
    step: tuple[int, int] | None = (2, 8),
    extra: int = 0,
    batch: int = 1,
    site: Site = SITE,
    sharp: float = 3.0,
    **facts: Any,
) -> Capture:
    """A capture of normal numbers times `sharp`, so that the softmax is peaked; with `extra` text tokens."""
    model = ModelFacts("Wan", "wan", {"": site.layers}, site, True, facts.pop("weights", "loaded"))
    held = Capture(place, {"by": "test"}, {"": model}, tuple(range(site.heads)), False, complete=True, **facts)
    generator = torch.Generator().manual_seed(5)
    for layer in layers:

        def normal(count: int, factor: float = 1.0) -> torch.Tensor:
            return factor * torch.randn(batch, count, site.heads, site.head_dim, generator=generator)

        tensors = {"q": normal(grid.tokens, sharp), "k": normal(grid.tokens), "v": normal(grid.tokens)}
        tensors["timestep"] = torch.full((batch,), 500.0)
        if extra:
            tensors |= {"extra_q": normal(extra, sharp), "extra_k": normal(extra), "extra_v": normal(extra)}
        file = item_name("", 0, 0 if step is None else step[0], layer)
        size = write_tensors(place / file, tensors)
        segments = (Segment("text", extra),) if extra else ()
        held = held.with_item(Item(file, "", 0, step, layer, grid, batch, "float32", size, segments))
    held.save()
    return held


def recipe(attention: Any, **more: Any) -> dict[str, Any]:
    """A recipe for a model that is there: no backbone, no size."""
    return {"name": more.pop("name", "mine"), "attention": {"*": attention}, **more}
