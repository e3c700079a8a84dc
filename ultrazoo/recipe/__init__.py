"""Recipes: YAML in, checked and priced plans out.

`load` reads (files, names, mappings, overrides), `check` lists every problem, `resolve` looks up every name, `make_plan`
prices. Importing this imports neither torch nor omegaconf.
"""

from __future__ import annotations

from .find import RecipeEntry, recipes
from .load import Recipe, load
from .plan import Plan, make_plan
from .resolve import check, resolve
from .resolved import Resolved, Sampling, StepRange, WeightsSource
from .schema import json_schema
from .text import write

__all__ = [
    "Plan",
    "Recipe",
    "RecipeEntry",
    "Resolved",
    "Sampling",
    "StepRange",
    "WeightsSource",
    "check",
    "json_schema",
    "load",
    "make_plan",
    "recipes",
    "resolve",
    "write",
]
