"""Recipes on a captured model: the attention of every captured layer and step, resolved at the capture's own grid.

A recipe's backbone must be the captured one by its dimensions; its size is replaced by the capture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import recipe as recipes
from ..errors import Problem, RecipeError, UsageError, listed
from ..grid import Grid
from ..options import got
from ..recipe import sections
from ..recipe.attentions import Expander, Placed, layer_map
from ..recipe.layers import Axis, assign
from ..recipe.tree import Map, located
from ..spec import AttentionSpec, Site
from .capture_files import ModelFacts


@dataclass(frozen=True)
class Candidate:
    """A recipe to probe: the attention as written, by layer and by step where steps have their own.

    `count` is how many steps there are, `weights` the file that the recipe names, `grid` its own size, `tree` what was read.
    """

    name: str
    source: str
    layers: Mapping[int, Placed]
    steps: Mapping[int, Mapping[int, Placed]]
    count: int | None
    seed: int
    weights: str | None
    grid: Grid | None
    tree: Map

    def at(self, site: Site, step: tuple[int, int] | None) -> AttentionSpec:
        """The attention at a site and step. Raises UsageError where the step is not known or counted otherwise, RecipeError
        with all problems at the site's grid."""
        placed = self.layers[site.layer]
        if self.steps:
            if step is None:
                raise UsageError(
                    "it has other attention at some steps, and this item was captured outside a sampling run"
                )
            if step[1] != self.count:
                raise UsageError(f"its steps are counted of {self.count}, the capture has {step[1]}")
            placed = self.steps.get(step[0], {}).get(site.layer, placed)
        spec, problems = Expander().expand(placed, site)
        if problems:
            raise RecipeError(self.source, problems)
        return spec


def candidate(source: Any, overrides: Sequence[str], model: ModelFacts, name: str | None = None) -> Candidate:
    """Read a recipe for a captured model. Raises RecipeError with its problems, UsageError for one of another model."""
    loaded = recipes.load(source, overrides)
    tree = loaded.tree
    read, found = sections.read(tree, loaded.name)
    # a recipe for a loaded model may leave backbone and size out
    problems = [one for one in found if tree.get(one.path.partition(".")[0]) is not None]
    if read.backbone is not None:
        backbone, _, more = read.backbone.settled(lambda key, path: loaded.beside(path, "backbone", key))
        problems += [one.under("backbone") for one in more]
        if backbone is not None and not problems:
            require_same(loaded.source, backbone, model)
    axis = Axis(model.groups, "layer", f"the captured {model.model}")
    layers, found, _ = layer_map(tree.get("attention"), axis, "attention", complete=True)
    problems += found
    count = None if read.sampling is None else read.sampling.steps
    steps, found = _steps(tree.get("steps"), axis, count)
    problems += found
    if problems:
        raise RecipeError(loaded.source, located(problems, tree))
    seed = read.head.seed if read.head is not None else 0
    weights = None if read.weights is None else str(loaded.beside(read.weights.path))
    grid = None
    if read.backbone is not None and read.video is not None:
        grid, _ = read.backbone.grid(read.video)
    return Candidate(name or loaded.name, loaded.source, layers, steps, count, seed, weights, grid, tree)


def require_same(source: str, backbone: Any, model: ModelFacts) -> None:
    """Raise UsageError where a recipe's backbone has other dimensions than the captured model, with each of them."""
    site = backbone.sites(Grid(1, 8, 8))[0]
    pairs = {
        "layers": (backbone.layers, model.layers),
        "heads": (site.heads, model.site.heads),
        "head_dim": (site.head_dim, model.site.head_dim),
        "dim": (site.dim, model.site.dim),
    }
    wrong = [f"{name} {mine}, the capture has {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if wrong:
        raise UsageError(
            f"{source} is for another model than the captured {model.model} ({model.backbone}): {listed(wrong)}; leave the "
            "recipe's backbone out (backbone=null), or capture its model"
        )


def _steps(node: Any, axis: Axis, count: int | None) -> tuple[dict[int, dict[int, Placed]], list[Problem]]:
    if node is None or (isinstance(node, Map) and not node):
        return {}, []
    if not isinstance(node, Map):
        return {}, [Problem("steps", f"expected step keys with a layer map each, got {got(node)}")]
    if count is None:
        return {}, [Problem("steps", "the recipe does not say how many steps there are", "add sampling: {steps: 30}")]
    holders, problems = assign(list(node), Axis({"": count}, "step", f"sampling with {count} steps"), "steps")
    maps = {}
    for key, value in node.items():
        maps[key], found, _ = layer_map(value, axis, f"steps.{key}", complete=False)
        problems += found
    return {step: maps[key] for step, key in enumerate(holders) if key is not None}, problems
