"""From a recipe as written to what it stands for: every name looked up, every option typed, every site checked.

Nothing stops at the first mistake: sections are read one by one, and whatever can still be checked is checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Problem, RecipeError, UltrazooError
from ..grid import Grid
from ..options import FrozenMap, got, join
from ..spec import AttentionSpec, BackboneSpec, Site
from . import overrides, sections
from .attentions import Expander, Placed, layer_map
from .layers import Axis, assign
from .load import Recipe
from .resolved import Resolved, StepRange, WeightsSource
from .tree import Map, from_plain, located

MOST_LAYERS = 10_000


def check(recipe: Recipe) -> list[Problem]:
    """Every problem of a recipe, with file and line; empty when it can be built."""
    resolved, problems = _resolve(recipe)
    if resolved is not None and not problems:
        problems += _candidates(recipe, resolved)
    return located(problems, recipe.tree)


def resolve(recipe: Recipe) -> Resolved:
    """What the recipe stands for. Raises RecipeError with all its problems."""
    resolved, problems = _resolve(recipe)
    if resolved is not None and not problems:
        problems += _candidates(recipe, resolved)
    if resolved is None or problems:
        raise RecipeError(recipe.source, located(problems, recipe.tree))
    return resolved


@dataclass
class _Work:
    """What is known so far while one recipe is resolved."""

    recipe: Recipe
    problems: list[Problem] = field(default_factory=list)
    grid: Grid | None = None
    axis: Axis | None = None
    sites: tuple[Site, ...] = ()


def _resolve(recipe: Recipe) -> tuple[Resolved | None, list[Problem]]:
    work = _Work(recipe)
    read, brought, found = _read(recipe)
    work.problems += found
    if read.backbone is not None:
        _place(work, read)
    layers, found, _ = layer_map(recipe.tree.get("attention"), work.axis, "attention", complete=True)
    work.problems += found
    steps = _steps(work, read)
    space, found = sections.search_space(recipe.tree)
    work.problems += found

    expander = Expander()
    attention = _expand(work, expander, layers)
    ranges = tuple(
        StepRange(first, last, _expand(work, expander, placed)) for first, last, placed in steps if work.sites
    )
    if work.problems or read.head is None or read.video is None or read.backbone is None or work.grid is None:
        return None, work.problems
    weights = read.weights
    if weights is not None:
        weights = replace(weights, path=str(recipe.beside(weights.path)))
    elif brought is not None:
        weights = WeightsSource(path=brought)
    return Resolved(
        name=read.head.name,
        summary=read.head.summary,
        source=read.head.source,
        backbone=read.backbone,
        video=read.video,
        grid=work.grid,
        sampling=read.sampling,
        sites=work.sites,
        attention=tuple(attention[layer] for layer in sorted(attention)),
        written=tuple(layers[layer].spec for layer in sorted(layers)),
        steps=_changes(ranges, attention),
        weights=weights,
        dtype=read.head.dtype,
        seed=read.head.seed,
        search=FrozenMap(space),
    ), []


def _read(recipe: Recipe) -> tuple[sections.Sections, str | None, list[Problem]]:
    """The sections, the backbone with what it names in files read in; and the checkpoint that it brings along."""
    read, problems = sections.read(recipe.tree, recipe.name)
    if read.backbone is None:
        return read, None, problems
    backbone, brought, found = read.backbone.settled(lambda key, path: recipe.beside(path, "backbone", key))
    return replace(read, backbone=backbone), brought, [*problems, *(one.under("backbone") for one in found)]


def _place(work: _Work, read: sections.Sections) -> None:
    """Layers, grid and sites of the backbone, as far as they can be known."""
    backbone, label = read.backbone, f"backbone {read.backbone_name}"
    assert backbone is not None
    groups = backbone.groups()
    count = sum(groups.values())
    if not 1 <= count <= MOST_LAYERS:
        work.problems.append(Problem("backbone", f"{count} layers, a model has 1 to {MOST_LAYERS}"))
        return
    work.axis = Axis(groups, "layer", label)
    if read.video is not None:
        work.grid, found = backbone.grid(read.video)
        work.problems += [problem.under("video") for problem in found]
    _sites(work, backbone, work.grid or Grid(1, 1, 1), None if read.sampling is None else read.sampling.steps)


def _sites(work: _Work, backbone: BackboneSpec, grid: Grid, steps: int | None) -> None:
    try:
        sites = backbone.sites(grid)
    except (ValueError, ZeroDivisionError, UltrazooError) as error:
        work.problems.append(Problem("backbone", f"{backbone.name!r} has no attention sites: {error}"))
        return
    wrong = [problem.under("backbone") for problem in backbone.problems(sites[0])]
    work.problems += wrong
    if work.grid is not None and not wrong:
        work.sites = tuple(site.at(steps=steps) for site in sites)


def _steps(work: _Work, read: sections.Sections) -> list[tuple[int, int, dict[int, Placed]]]:
    """Runs of sampling steps with one entry of ``steps`` each: first, last, specs per layer."""
    node = work.recipe.tree.get("steps")
    if node is None or (isinstance(node, Map) and not node):
        return []
    if not isinstance(node, Map):
        rule = f"expected step keys with a layer map each, got {got(node)}"
        work.problems.append(Problem("steps", rule, 'for example "0-11": {"*": full}'))
        return []
    maps = {}
    for key, value in node.items():
        maps[key], found, _ = layer_map(value, work.axis, join("steps", key), complete=False)
        work.problems += found
    if read.sampling is None:
        if work.recipe.tree.get("sampling") is None:
            rule = "'steps' counts sampling steps, and the recipe does not say how many there are"
            work.problems.append(Problem("steps", rule, "add sampling: {steps: 30}"))
        return []
    count = read.sampling.steps
    keys, found = assign(list(node), Axis({"": count}, "step", f"sampling with {count} steps"), "steps")
    work.problems += found
    runs: list[tuple[int, int, dict[int, Placed]]] = []
    first = 0
    for step in range(1, count + 1):
        if step == count or keys[step] != keys[first]:
            holder = keys[first]
            if holder is not None:
                runs.append((first, step - 1, maps[holder]))
            first = step
    return runs


def _expand(work: _Work, expander: Expander, placed: dict[int, Placed]) -> dict[int, AttentionSpec]:
    """Specs after expansion per layer; problems go into `work`, one that several layers have once."""
    if not work.sites:
        return {}
    made: dict[int, AttentionSpec] = {}
    seen: dict[Problem, None] = {}
    for layer, one in placed.items():
        made[layer], found = expander.expand(one, work.sites[layer])
        seen.update(dict.fromkeys(found))
    work.problems += seen
    return made


def _changes(ranges: tuple[StepRange, ...], attention: dict[int, AttentionSpec]) -> tuple[StepRange, ...]:
    """Step ranges without the layers in which they change nothing."""
    kept = [
        replace(one, layers={layer: spec for layer, spec in one.layers.items() if spec != attention[layer]})
        for one in ranges
    ]
    return tuple(one for one in kept if one.layers)


def _candidates(recipe: Recipe, resolved: Resolved) -> list[Problem]:
    """Values of the search space that no recipe may hold where they would go: wrong types, unknown names."""
    problems: list[Problem] = []
    for path, value, where in sections.candidates(resolved.search):
        tree, found = overrides.put(recipe.tree, path, from_plain(value, recipe.tree.mark)[0])
        if not found:
            tried = replace(recipe, tree=tree)
            found = _types(tried)
        problems += [Problem(where, f"{got(value)} does not fit there: {one.rule}", one.fix) for one in found[:1]]
    return problems


def _types(recipe: Recipe) -> list[Problem]:
    """Problems of types and names alone: what only a size decides may depend on the other paths searched."""
    read, _, problems = _read(recipe)
    axis = None
    if read.backbone is not None:
        axis = Axis(read.backbone.groups(), "layer", f"backbone {read.backbone_name}")
    maps: list[tuple[str, Any]] = [("attention", recipe.tree.get("attention"))]
    steps = recipe.tree.get("steps")
    if isinstance(steps, Map):
        maps += [(join("steps", key), node) for key, node in steps.items()]
    for path, node in maps:
        problems += layer_map(node, axis, path, complete=path == "attention")[1]
    return problems
