"""From a plan to a model, and to a directory and back.

A model is made on the meta device first, where it costs nothing; its parameters are then made or loaded one at a time,
into the module (`build`) or straight to a file (`build_directory`), so that memory stays near the size of the model in
the first case and of a few tensors in the second.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from . import __version__, recipe
from .backbones.adapted import AdaptedSpec
from .backbones.placed import inside
from .errors import OutputError, UltrazooError, UsageError, WeightsError, listed
from .weights import config
from .weights.disk import write_bytes
from .weights.match import Match, match
from .weights.meaning import require_same_meaning
from .weights.own import new_slots
from .weights.reader import Checkpoint, open_checkpoint
from .weights.slots import Slot, Unfilled, Values, attention_paths, slots_of, stream
from .weights.staging import refuse_existing, staged
from .weights.writer import Progress, Written, order, write_checkpoint

if TYPE_CHECKING:
    from .recipe import Plan, Recipe, Resolved

    Source = str | Path | Mapping[str, Any] | Recipe | Resolved | Plan

ExtraFiles = Mapping[str, Callable[[], bytes]]
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
WEIGHTS_FILE = "model"
RESERVED = ("recipe.yaml", "plan.json", config.FILE)


def build(
    source: Source,
    *overrides: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """The model of a recipe, with its weights loaded or freshly made, and its plan as ``.plan``.

    `source` is a recipe (path, name, mapping or loaded) or a plan; `overrides` are ``key=value``. `dtype` overrides the
    recipe's. On ``device="meta"`` nothing is allocated and no checkpoint is opened. ``.origin`` says where the numbers
    come from. Raises RecipeError with all problems, WeightsError when the recipe's weights do not fit.
    """
    plan = plan_of(source, *overrides, dtype=dtype)
    where = _device(device)
    kind = DTYPES[plan.resolved.dtype]
    model = skeleton(plan)
    if where.type == "meta":
        return model.to(kind)
    with _opened(plan, model) as (checkpoint, found):
        _fill(Values(model, seed=plan.resolved.seed, dtype=kind, match=found, checkpoint=checkpoint), where)
    model.origin = _origin(plan, found)  # type: ignore[assignment]
    return model


def skeleton(plan: Plan) -> nn.Module:
    """The plan's model on the meta device: every module, name and shape, no memory.

    Raises UltrazooError when it has another number of parameters than the plan says.
    """
    resolved = plan.resolved
    steps = [(one.first, one.last, dict(one.layers)) for one in resolved.steps]
    with torch.device("meta"), Unfilled():
        model: nn.Module = resolved.backbone.module(
            resolved.backbone, resolved.attention, grid=resolved.grid, steps=steps
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != plan.totals.parameters:
        raise UltrazooError(
            f"the plan of {plan.name} says {plan.totals.parameters} parameters, the model has {count}: the cost of backbone "
            f"{resolved.backbone.name!r} or of one of its attentions ({listed(sorted({s.name for s in resolved.attention}))}) "
            "is wrong"
        )
    model.plan = plan  # type: ignore[assignment]
    return model


def build_directory(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    extra_files: ExtraFiles | None = None,
) -> Match | None:
    """Build a plan into a directory: recipe, plan, config, weights, and `extra_files` (name → function giving bytes).

    The model is never in memory: each parameter is made on the CPU, cast, written and dropped. The directory appears
    whole or not at all. Returns what was reused, new and dropped when the recipe loads weights, else None. Raises
    OutputError, WeightsError.
    """
    refuse_existing(Path(os.path.realpath(out)), force)
    model = skeleton(plan)
    dtype = DTYPES[plan.resolved.dtype]
    with _opened(plan, model) as (checkpoint, found):
        values = Values(model, seed=plan.resolved.seed, dtype=dtype, match=found, checkpoint=checkpoint)
        write_directory(
            plan, values.slots, values.entry, values.tensor, _origin(plan, found), out, force, progress, extra_files
        )
    return found


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    parts: Literal["all", "new"] = "all",
    force: bool = False,
    progress: Progress | None = None,
    extra_files: ExtraFiles | None = None,
) -> None:
    """Write a built model as a directory that `from_pretrained` opens, every tensor bit for bit, in the type it has.

    With ``parts="new"`` only what `apply` added to a loaded model, for the `weights` of a recipe. An existing directory
    is refused unless `force`. Raises UsageError for a model without a plan or whose parameters are not the plan's
    (adapters must be merged or removed first), OutputError when the place cannot be written.
    """
    if parts not in ("all", "new"):
        raise UsageError(f"parts is all or new, got {parts!r}")
    model, plan, origin = planned(model)
    slots = _parts(plan, model, parts)
    if any(slot.get().is_meta for slot in slots):
        raise UsageError("this model is on the meta device: it has no numbers to save")
    _same_parameters(plan, slots, parts)
    refuse_existing(Path(os.path.realpath(directory)), force)
    write_directory(
        plan,
        slots,
        Slot.entry,
        lambda slot: slot.get().detach().cpu(),
        origin,
        directory,
        force,
        progress,
        extra_files,
        parts,
    )


def planned(model: nn.Module) -> tuple[nn.Module, Plan, Mapping[str, Any]]:
    """A model without what is wrapped around it (which prefixes its names), its plan and where its numbers come from.

    Raises UsageError for a model without a plan.
    """
    model = inside(model)
    plan = getattr(model, "plan", None)
    if plan is None:
        raise UsageError(
            "this model has no plan: save takes models made by build or from_pretrained, or changed by apply"
        )
    return model, plan, getattr(model, "origin", None) or {"seed": None, "weights": None}


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Open a directory that `build_directory` or `save` wrote: the model in evaluation mode, with ``.plan``.

    Tensors keep the type they were saved in unless `dtype` is given. Raises UsageError when it is not such a directory,
    RegistryError with the pip line when a plugin is missing, WeightsError when the weights are damaged or not these.
    """
    place = Path(directory)
    content = config.read(place)
    config.require_plugins(place, content["plugins"])
    if config.holds_new(content):
        raise UsageError(
            f"{place} holds the new parameters of a design alone: load the model that they were trained in, and apply "
            f"{place / 'recipe.yaml'} to it with weights.path={place}"
        )
    plan = plan_of(content["recipe"])
    if plan.hash != content["hash"]:
        raise WeightsError(
            f"{place}: its recipe has hash {plan.hash} here and {content['hash']} when it was saved by ultrazoo "
            f"{content['ultrazoo']}; the directory was edited, or a plugin or ultrazoo {__version__} reads it differently"
        )
    if dtype is not None:
        plan = plan_of(plan, dtype=dtype)
    config.require_files(place, content["weights"])
    model = skeleton(plan)
    where = _device(device)
    with open_checkpoint(_weights_file(place)) as checkpoint:
        found = _match(plan, model, checkpoint, "ultrazoo", whole=True)
        kind = None if dtype is None else DTYPES[plan.resolved.dtype]
        _fill(Values(model, seed=plan.resolved.seed, dtype=kind, match=found, checkpoint=checkpoint), where)
    model.origin = content["origin"]
    return model.eval()


def _device(device: str | torch.device | None) -> torch.device:
    """The device of that name, torch's default where none is given. Raises UsageError for a name that torch does not know."""
    if device is None:
        return torch.get_default_device()
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def plan_of(source: Source, *overrides: str, dtype: str | torch.dtype | None = None) -> Plan:
    """The plan of a recipe (path, name, mapping or loaded) or of a plan, with overrides and another dtype. Raises
    RecipeError with all problems, UsageError for a dtype that is none."""
    if dtype is not None:
        overrides = (*overrides, f"dtype={_dtype_name(dtype)}")
    if isinstance(source, recipe.Plan):
        if not overrides:
            return source
        source = source.resolved
    if isinstance(source, recipe.Resolved):
        if not overrides:
            return recipe.make_plan(source)
        source = source.data()
    if isinstance(source, recipe.Recipe):
        if not overrides:
            return recipe.make_plan(recipe.resolve(source))
        source = source.data()
    return recipe.make_plan(recipe.resolve(recipe.load(source, overrides)))


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype is one of {listed(DTYPES)}, got {name!r}")
    return name


@contextlib.contextmanager
def _opened(plan: Plan, model: nn.Module) -> Iterator[tuple[Checkpoint | None, Match | None]]:
    """The checkpoint that the recipe names and how it fits, or (None, None)."""
    source = plan.resolved.weights
    if source is None:
        yield None, None
        return
    with open_checkpoint(source.path) as checkpoint:
        found = _match(plan, model, checkpoint, source.format)
        require_same_meaning(checkpoint, found, plan.resolved.attention, plan.resolved.sites)
        yield checkpoint, found


def _match(plan: Plan, model: nn.Module, checkpoint: Checkpoint, layout: str, whole: bool = False) -> Match:
    backbone = plan.resolved.backbone
    return match(
        checkpoint,
        {slot.name: slot.entry() for slot in slots_of(model) if slot.saved},
        backbone=backbone.name,
        model=f"{plan.name} ({backbone.name})",
        extras=() if whole else attention_paths(model),
        layout=layout,
        whole=whole,
        own_names=isinstance(backbone, AdaptedSpec),
    )


def _fill(values: Values, device: torch.device) -> None:
    """Give every slot of a meta model its value on `device`, in memory of its own."""
    by_name = {slot.name: slot for slot in values.slots}
    for name, tensor in stream(values.slots, values.tensor):
        moved = tensor.to(device)
        # a tensor of the file's own memory would change, or vanish, with the file
        by_name[name].put(moved.clone() if values.borrows(name) and moved.device.type == "cpu" else moved)


def _origin(plan: Plan, found: Match | None) -> dict[str, Any]:
    return {"seed": plan.resolved.seed, "weights": None if found is None else found.data()}


def _parts(plan: Plan, model: nn.Module, parts: str) -> list[Slot]:
    if parts == "all":
        return slots_of(model)
    if not isinstance(plan.resolved.backbone, AdaptedSpec):
        raise UsageError(
            f"parts='new' is for models of other libraries that apply changed; {plan.name} is a "
            f"{plan.resolved.backbone.name!r} and saved whole"
        )
    slots = new_slots(model)
    if not slots:
        raise UsageError(f"the design of {plan.name} has no parameters of its own; there is nothing to save")
    return slots


def _same_parameters(plan: Plan, slots: list[Slot], parts: str) -> None:
    due = {slot.name: slot.shape for slot in _parts(plan, skeleton(plan), parts)}
    got = {slot.name: slot.shape for slot in slots}
    differ = sorted(name for name in {*due, *got} if due.get(name) != got.get(name))
    if differ:
        raise UsageError(
            f"the model's parameters are not those of its plan: {listed(differ[:4])}{' …' if len(differ) > 4 else ''} "
            f"({len(differ)} differ); merge or remove adapters before saving"
        )


def write_directory(
    plan: Plan,
    slots: list[Slot],
    entry: Callable[[Slot], Any],
    tensor: Callable[[Slot], torch.Tensor],
    origin: Mapping[str, Any],
    out: str | os.PathLike[str],
    force: bool,
    progress: Progress | None,
    extra_files: ExtraFiles | None,
    parts: str = "all",
) -> list[Written]:
    """Write the slots of a plan's model, as `entry` and `tensor` give them, into the directory `out`, staged."""
    extra = dict(extra_files or {})
    for name in extra:
        if name in RESERVED or name.startswith(WEIGHTS_FILE) or Path(name).name != name:
            raise OutputError(f"{name!r} cannot be added to a model's directory")
    by_name = {slot.name: slot for slot in slots if slot.saved}
    entries = order([entry(slot) for slot in by_name.values()])
    with staged(out, force=force) as new:
        write_bytes(new / "recipe.yaml", _recipe_text(plan).encode())
        write_bytes(new / "plan.json", (json.dumps(plan.to_json(), indent=2, allow_nan=False) + "\n").encode())
        for name, content in extra.items():
            write_bytes(new / name, content())
        written = write_checkpoint(
            new,
            entries,
            stream([by_name[one.name] for one in entries], tensor),
            metadata={"ultrazoo": __version__, "recipe_hash": plan.hash},
            stem=WEIGHTS_FILE,
            progress=progress,
        )
        dtypes = {str(one.dtype).removeprefix("torch.") for one in entries}
        write_bytes(new / config.FILE, config.make(plan, written, sorted(dtypes), origin, parts))
    return written


def _recipe_text(plan: Plan) -> str:
    head = f"# resolved by ultrazoo {__version__}, recipe hash {plan.hash}\n"
    return head + recipe.write(plan.resolved.data())


def _weights_file(directory: Path) -> Path:
    index = directory / f"{WEIGHTS_FILE}.safetensors.index.json"
    return index if index.is_file() else directory / f"{WEIGHTS_FILE}.safetensors"
