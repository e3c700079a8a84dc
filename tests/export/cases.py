"""The matrix of exports: every form of every attention that claims a target, in small models of both native backbones.

Forms are the `examples()` of each registered attention and those below: between them, every part that a recipe can put
into a branch. A form that a backbone does not take as it is (coordinates without a rotary embedding) is proved there
without what it does not take, or, where nothing would be left of it, in the other backbone alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ultrazoo
from tests.export.forms import MORE
from ultrazoo import registry
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part, to_data
from ultrazoo.ports import EXPORTS
from ultrazoo.spec import Rope, Site
from ultrazoo.testing.scenario import examples_of

BACKBONES = ("wan", "dit")
ROTARY = ("coords", "cell", "rope")
"""Options that say something to a rotary embedding, which dit has not."""
COMPILED: frozenset[str] = frozenset()
"""Forms beside the first of each attention that are compiled for aoti, a minute each. The compiler starts from the very
program that pt2 holds, which is proved for all."""
GRIDS = {
    "video": ((3, 5, 7), (3, 9, 11), (5, 9, 11), (9, 9, 11), (5, 17, 19)),
    "image": ((1, 5, 7), (1, 9, 11), (1, 17, 19)),
}
"""Sizes of recipes, the first that suits a form; what is proved are sizes that follow from the form's smallest grid."""


@dataclass(frozen=True)
class Case:
    """One form of an attention in a backbone, as recipe data. `form` tells it from the others of that attention."""

    attention: str
    form: str
    backbone: str
    options: Mapping[str, Any]
    heads: int
    head_dim: int
    grid: Grid
    layers: int
    targets: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.attention}/{self.form}/{self.backbone}"

    def recipe(self, target: str) -> dict[str, Any]:
        """The model whose export to `target` is proved; one layer where a compiler takes a minute for each."""
        layers = 1 if target == "aoti" else self.layers
        return _recipe(self.id, self.backbone, self.options, self.heads, self.head_dim, self.grid, layers)


def _recipe(
    name: str, backbone: str, options: Mapping[str, Any], heads: int, head_dim: int, grid: Grid, layers: int
) -> dict[str, Any]:
    sizes: dict[str, Any] = {"name": backbone, "dim": heads * head_dim, "heads": heads, "layers": layers}
    if backbone == "wan":
        sizes |= {"ffn_dim": 40, "channels": 4, "text_dim": 12, "text_tokens": 7, "time_dim": 32, "trained": [2, 4, 4]}
    else:
        sizes |= {"ffn_ratio": 2, "classes": 10}
    return {
        "schema": 1,
        "name": name.replace("/", "_"),
        "video": {"grid": list(grid)},
        "backbone": sizes,
        "attention": {"*": dict(options)},
        "dtype": "float32",
        "seed": 0,
    }


@cache
def cases() -> tuple[Case, ...]:
    """Every case that claims at least one target, in the order of the registry."""
    found = []
    for row in registry.entries("attention"):
        if row.builtin:
            found += list(_cases_of(row.name))
    return tuple(found)


def _cases_of(attention: str) -> Iterator[Case]:
    """The first form in both backbones, the others where they belong: with a rotary embedding in wan, without in dit."""
    forms = [
        (str(index), to_data(example.spec), example.site)
        for index, example in enumerate(examples_of(registry.find("attention", attention)))
    ]
    site = Site(dim=16, heads=2, head_dim=8, rope=Rope((4, 2, 2)))
    forms += [(name, {"name": attention, **options}, site) for name, options in MORE.get(attention, {}).items()]
    seen: list[Any] = []
    for form, options, site in forms:
        places = ("dit",) if site.rope is None else ("wan",)
        for backbone in places if seen else BACKBONES:
            case = _fitted(attention, form, backbone, options, site.heads, site.head_dim)
            if case is not None and case.targets and (backbone, case.options) not in seen:
                seen.append((backbone, case.options))
                yield case


def _fitted(
    attention: str, form: str, backbone: str, options: Mapping[str, Any], heads: int, head_dim: int
) -> Case | None:
    """The form at the first size that suits it: videos in wan, images in dit where the form takes them."""
    layers = _period(attention, options)
    kinds = ("video", "image") if backbone == "wan" else ("image", "video")
    written = [options] if backbone == "wan" else [options, without(options, ROTARY)]
    for one in written:
        for grid in (Grid(*size) for kind in kinds for size in GRIDS[kind]):
            recipe = _recipe("case", backbone, one, heads, head_dim, grid, layers)
            if ultrazoo.check(recipe):
                continue
            # a composition may stand for something plainer in so few layers: what counts is what it says of itself, too
            written, _ = parse_part("attention", one)
            claimed = [spec.traits().export for spec in (written, *ultrazoo.plan(recipe).resolved.attention)]
            targets = [target for target in EXPORTS if all(target in layer for layer in claimed)]
            if "aoti" in targets and form != "0" and f"{attention}/{form}" not in COMPILED:
                targets.remove("aoti")
            return Case(attention, form, backbone, one, heads, head_dim, grid, layers, tuple(targets))
    return None


def _period(attention: str, options: Mapping[str, Any]) -> int:
    """Layers until a form repeats: 1 where all are alike, 2 where windows move on odd ones, the axes where they alternate."""
    if attention == "axes" and options.get("mode", "alternate") == "alternate":
        return len(options["axes"]) if "axes" in options else 3
    moves = attention in ("swin", "ultragen") or without(options, ("shift",)) != options
    return 2 if moves else 1


def without(options: Any, names: tuple[str, ...]) -> Any:
    """Recipe data without the options of these names, at any depth."""
    if isinstance(options, Mapping):
        return {key: without(value, names) for key, value in options.items() if key not in names}
    if isinstance(options, list | tuple):
        return [without(value, names) for value in options]
    return options
