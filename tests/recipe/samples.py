"""Small recipes and the problems they have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrazoo import recipe
from ultrazoo.errors import Problem, RecipeError

WAN = {
    "name": "wan",
    "dim": 48,
    "layers": 6,
    "heads": 4,
    "ffn_dim": 64,
    "text_dim": 16,
    "text_tokens": 4,
    "time_dim": 8,
}


def small(**changes: Any) -> dict[str, Any]:
    """A recipe of six tiny Wan layers on the grid (3, 9, 10), with sections replaced."""
    return {
        "name": "small",
        "video": {"grid": [3, 9, 10]},
        "backbone": dict(WAN),
        "attention": {"*": {"name": "full"}},
        **changes,
    }


def branched(**branches: Any) -> dict[str, Any]:
    return {"name": "branched", "branches": branches or {"one": {"layout": {"name": "windows", "counts": [3, 2]}}}}


def problems_of(source: str | Path | Mapping[str, Any], *overrides: str) -> list[Problem]:
    """Everything wrong with a recipe, whether it is found while reading or later."""
    try:
        return recipe.check(recipe.load(source, overrides))
    except RecipeError as error:
        return list(error.problems)


def resolved(source: str | Path | Mapping[str, Any], *overrides: str) -> recipe.Resolved:
    return recipe.resolve(recipe.load(source, overrides))


def names(one: recipe.Resolved) -> list[str]:
    """The name of every layer's attention."""
    return [spec.name for spec in one.attention]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
