"""`apply`: a recipe's attention put into a model that is already loaded; `remove` takes it out again.

The model keeps its weights, its wrappers (quantised linears, LoRA, offloading) and its class; only the visual
self-attentions that the recipe replaces change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from . import recipe
from .backbones.adapted import AdaptedSpec
from .backbones.placed import MARK, inside, uninstall
from .backbones.recognised import node_of, same
from .backbones.session import Session
from .errors import UsageError, WeightsError, listed
from .recipe.tree import Mark, copy, from_plain
from .weights.match import Match
from .weights.own import load_new
from .weights.starts import start_parameters

if TYPE_CHECKING:
    from .recipe import Plan, Recipe, Resolved

    Source = str | Path | Mapping[str, Any] | Recipe | Resolved | Plan

COMPONENTS = ("transformer", "transformer_2")
"""Where a pipeline keeps the models that a recipe is for."""


@dataclass(frozen=True)
class AppliedModel:
    """What happened to one model: `replaced` and `kept` layers by module path, and the parameters that came along.

    `loaded` is the file they came from; None: they are as the design starts.
    """

    name: str
    model: str
    plan: Plan
    replaced: dict[str, str]
    kept: tuple[str, ...]
    parameters: int
    loaded: Match | None = None

    def data(self) -> dict[str, Any]:
        return {
            "component": self.name,
            "model": self.model,
            "hash": self.plan.hash,
            "replaced": self.replaced,
            "kept": list(self.kept),
            "new_parameters": self.parameters,
            "weights": None if self.loaded is None else self.loaded.data(),
        }


@dataclass(frozen=True)
class Report:
    """What `apply` did. `starts`: how each design used starts, and who says so; `streams`: rows beside the grid."""

    models: tuple[AppliedModel, ...]
    starts: tuple[str, ...]
    streams: str
    notes: tuple[str, ...] = field(default=())

    @property
    def plan(self) -> Plan:
        return self.models[0].plan

    @property
    def untuned(self) -> tuple[str, ...]:
        """Designs that need tuning and run without tuned weights, each with who says so."""
        found = {}
        for one in self.models:
            for spec in one.plan.resolved.written if one.loaded is None else ():
                start = spec.traits().start
                if start.kind == "needs tuning":
                    found[spec.name] = f"{spec.name} needs tuning ({start.source}) and no tuned weights are loaded"
        return tuple(found[name] for name in sorted(found))

    def data(self) -> dict[str, Any]:
        return {
            "models": [one.data() for one in self.models],
            "starts": list(self.starts),
            "streams": self.streams,
            "untuned": list(self.untuned),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = []
        for one in self.models:
            designs = sorted(set(one.replaced.values()))
            lines.append(
                f"{one.name or one.model}: {len(one.replaced)} of {len(one.replaced) + len(one.kept)} self-attentions run "
                f"{listed(designs) or 'nothing new'}; {one.parameters} new parameters"
            )
            if one.loaded is not None:
                lines.append(f"{len(one.loaded.reused)} tensors of them loaded from {one.loaded.path}")
        lines += [f"warning: {one}" for one in self.untuned]
        lines += [f"starts: {start}" for start in self.starts]
        lines.append(f"rows beside the grid: {self.streams}")
        return "\n".join([*lines, *self.notes])


def apply(target: Any, source: Source, *overrides: str) -> Report:
    """Put a recipe's attention into a loaded model or pipeline, in place, and say what was done.

    `target` is a model of an adapted class, or a pipeline with one as ``transformer`` (and ``transformer_2``). The
    recipe may leave its backbone out; one that it names must be the model's. New parameters start as the recipe's seed
    says, or are those of the file that its `weights` names, in the model's dtype and on its device; for a pipeline with two
    models that is a folder with one of each name. A model is changed wholly or not at all. Raises UsageError for a model
    nobody knows, RecipeError with all problems, WeightsError with a table for weights that are not the design's.
    """
    models = _models(target)
    written = _loaded(source, overrides).data().get("backbone")
    known = {name: node_of(model, written) for name, model in models.items()}
    plans = {name: plan_for(known[name], source, overrides) for name in models}
    done: list[AppliedModel] = []
    try:
        for name, model in models.items():
            done.append(_install(name, model, plans[name], _weights_of(plans[name], name, list(models))))
    except BaseException:
        for one in done:
            remove(models[one.name])
        raise
    specs = {one.name: one for plan in plans.values() for one in plan.resolved.written}
    starts = tuple(f"{name}: {one.traits().start}" for name, one in sorted(specs.items()))
    adapters = {plan.resolved.backbone.adapter().streams for plan in plans.values()}  # type: ignore[attr-defined]
    return Report(tuple(done), starts, "; ".join(sorted(adapters)))


def remove(target: Any) -> list[str]:
    """Undo `apply`: the model's own attentions, as they were. Returns the module paths restored.

    Of a pipeline's models, those that run a recipe. Raises UsageError where none does.
    """
    models = list(_models(target).values())
    applied = [model for model in models if MARK in vars(model)]
    return [path for model in applied or models for path in uninstall(model)]


def _models(target: Any) -> dict[str, nn.Module]:
    """The models inside `target`, by the name of their component; the model itself under the empty name."""
    if isinstance(target, nn.Module):
        return {"": _inside(target)}
    found = {name: getattr(target, name, None) for name in COMPONENTS}
    models = {name: _inside(model) for name, model in found.items() if isinstance(model, nn.Module)}
    if not models:
        raise UsageError(f"apply takes a model or a pipeline with a transformer, got {type(target).__name__}")
    return models


def _inside(model: nn.Module) -> nn.Module:
    """The model itself. Raises UsageError for a wrapper that has to know every parameter from its start."""
    inner = inside(model)
    if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UsageError(f"{type(inner).__name__} knows only the parameters it was made with: apply first, then wrap")
    return inner


def plan_for(backbone: dict[str, Any], source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """The plan of a recipe on another backbone node of the same model; a recipe may leave its backbone out."""
    loaded = _loaded(source, overrides)
    data = loaded.data()
    written = data.get("backbone")
    if written is not None and not same(written, backbone):
        raise UsageError(
            f"{loaded.source}: its backbone is {_label(written)}, the model is {_label(backbone)}; leave the recipe's "
            "backbone out, or name the model's"
        )
    kept = {key: value for key, value in (written or {}).items() if key in ("text_tokens", "strides")}
    # the tree keeps its marks: problems still name the recipe's file and line, paths stay relative to it
    node, _ = from_plain({**backbone, **kept}, Mark())
    tree = copy(loaded.tree)
    tree.put("backbone", node, Mark())
    return recipe.make_plan(recipe.resolve(replace(loaded, tree=tree)))


def _loaded(source: Source, overrides: tuple[str, ...]) -> Recipe:
    if isinstance(source, recipe.Plan):
        source = source.resolved
    if isinstance(source, recipe.Resolved):
        source = source.data()
    if isinstance(source, recipe.Recipe):
        source = source.data()
    return recipe.load(source, overrides)


def _label(written: Any) -> str:
    if not isinstance(written, Mapping):
        return str(written)
    return "/".join(str(written[key]) for key in ("name", "model", "preset") if written.get(key))


def _weights_of(plan: Plan, name: str, names: list[str]) -> Path | None:
    """Where the new parameters of the component `name` are."""
    source = plan.resolved.weights
    if source is None:
        return None
    place = Path(source.path)
    if len(names) == 1:
        return place
    if not (place / name).is_dir():
        raise WeightsError(f"{place}: this pipeline has {listed(names)}; weights are a folder with one of each name")
    return place / name


def _install(name: str, model: nn.Module, plan: Plan, weights: Path | None) -> AppliedModel:
    resolved = plan.resolved
    spec = resolved.backbone
    assert isinstance(spec, AdaptedSpec)
    steps = [(one.first, one.last, dict(one.layers)) for one in resolved.steps]
    session = Session(spec, resolved.attention, resolved.grid, steps)
    spec.install(model, session)
    try:
        count = start_parameters(model, resolved.seed)
        loaded = None
        if weights is not None:
            assert resolved.weights is not None
            loaded = load_new(plan, model, weights, resolved.weights.format)
    except BaseException:
        uninstall(model)
        raise
    vars(model)["plan"] = plan
    came_from = None if loaded is None else loaded.data()
    vars(model)["origin"] = {"seed": resolved.seed, "weights": came_from, "applied": type(model).__name__}
    paths = spec.paths()
    replaced = {
        path: written.name
        for path, written, one, other in zip(paths, resolved.written, session.specs, session.alternatives, strict=True)
        if one.name != "original" or other
    }
    kept = tuple(path for path in paths if path not in replaced)
    return AppliedModel(name, type(model).__name__, plan, replaced, kept, count, loaded)


__all__ = ["AppliedModel", "Report", "apply", "remove"]
