"""The table of restored models in docs/backbones.md, measured: ``python -m tests.backbones.adapters.restored`` writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ultrazoo
from tests.backbones.adapters import test_parity as parity
from tests.backbones.adapters import test_timm as vits
from tests.backbones.adapters.tiny import TINY, arguments, made
from tests.backbones.adapters.vits import FAMILIES, GRIDS, image
from tests.backbones.adapters.vits import made as vit_made
from tests.backbones.adapters.vits import recipe as vit_recipe
from ultrazoo.backbones.diffusers import ADAPTERS

PAGE = Path(__file__).parents[3] / "docs" / "backbones.md"
BEGIN, END = "<!-- restored -->\n", "<!-- /restored -->"
HEAD = """\
| model | replaced | by | rows beside the grid | called | error |
| --- | --- | --- | --- | --- | --- |
"""


def table() -> str:
    """The whole table, every figure measured now."""
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in (*_diffusers(), *_timm()))


def written(page: str) -> str:
    """The table that the page holds."""
    return page.split(BEGIN)[1].split(END)[0]


def _diffusers() -> Iterator[tuple[str, ...]]:
    for name in sorted(ADAPTERS):
        row, model = TINY[name], made(name)
        calls = [arguments(name, variant, grid) for variant in row.variants for grid in row.grids]
        with torch.no_grad():
            due = [parity.run(model, given) for given in calls]
            report = ultrazoo.apply(model, parity.recipe(name, row.own))
            error = max(parity.worst(parity.run(model, given), one) for given, one in zip(calls, due, strict=True))
        own = row.own if isinstance(row.own, str) else row.own["name"]
        yield _row(f"`{name}`", report, own, report.streams, ", ".join(row.variants), error)


def _timm() -> Iterator[tuple[str, ...]]:
    for family, row in FAMILIES.items():
        model: Any = vit_made(family)
        calls = []
        for grid in GRIDS:
            x = image(model, grid)
            mask = torch.ones(2, 1, 1, grid[1] * grid[2] + model.num_prefix_tokens, dtype=torch.bool)
            mask[0, ..., -9:] = False
            calls += [(x, None), (x, mask)]
        with torch.no_grad():
            due = [vits.outputs(model, x, attn_mask=mask) for x, mask in calls]
            report = ultrazoo.apply(model, vit_recipe("full"))
            found = (vits.outputs(model, x, attn_mask=mask) for x, mask in calls)
            error = max(vits.worst(one, other) for one, other in zip(found, due, strict=True))
        front = f"{model.num_prefix_tokens} in front: rows dense, keys always" if model.num_prefix_tokens else "none"
        yield _row(f"{family} (`{row.model}`)", report, "full", front, "plain, masked", error)


def _row(model: str, report: Any, own: str, beside: str, calls: str, error: float) -> tuple[str, ...]:
    return model, _paths(list(report.models[0].replaced)), f"`{own}`", beside, calls, _bound(error)


def _paths(paths: list[str]) -> str:
    return ", ".join(dict.fromkeys(f"`{re.sub(r'[0-9]+', 'N', path, count=1)}`" for path in paths))


def _bound(error: float) -> str:
    """The power of ten above, 1e-6 at least: what differs between machines, down to no error at all, is below it."""
    return f"< 1e{math.floor(math.log10(max(error, 1.01e-7))) + 1}"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
