"""The Python names that take a recipe by path, name or mapping, with ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import Problem
    from .recipe import Plan, Recipe

    Source = str | Path | Mapping[str, Any] | Recipe


def load(source: Source, *overrides: str) -> Recipe:
    """Read a recipe and apply the overrides, without checking what its names mean.

    Raises RecipeError for a missing file, text that is not YAML, a bad override or an `extends` cycle.
    """
    from . import recipe

    if isinstance(source, recipe.Recipe):
        return recipe.load(source.data(), overrides) if overrides else source
    return recipe.load(source, overrides)


def check(source: Source, *overrides: str) -> list[Problem]:
    """Every problem of a recipe, empty when it can be built; raises RecipeError only when it cannot be read at all."""
    from . import recipe

    return recipe.check(load(source, *overrides))


def plan(source: Source, *overrides: str) -> Plan:
    """The resolved, checked and priced recipe; raises RecipeError with all problems."""
    from . import recipe

    return recipe.make_plan(recipe.resolve(load(source, *overrides)))
