"""The parameters of a design inside a model of another library: which they are, and a file of them put in.

A model that `apply` changed has its own weights from its own files; what is trained of the design alone is kept by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UsageError, WeightsError, listed
from .match import INSIDE, Match, match
from .meaning import require_same_meaning
from .reader import Checkpoint, open_checkpoint
from .slots import Slot, attention_paths, slots_of

if TYPE_CHECKING:
    from ..recipe import Plan


def new_slots(model: nn.Module) -> list[Slot]:
    """What is saved of the attentions that a design put into `model`; the model's own weights are none of it."""
    inside = tuple(f"{path}." for path in attention_paths(model))
    return [slot for slot in slots_of(model) if slot.saved and slot.name.startswith(inside)]


def is_new_only(checkpoint: Checkpoint) -> bool:
    """Whether every key is of a design inside a model of another library."""
    return len(checkpoint) > 0 and all(INSIDE in key for key in checkpoint)


def match_new(plan: Plan, model: nn.Module, checkpoint: Checkpoint, layout: str = "auto") -> Match:
    """Pair the new parameters of `model` with those in the file, all with all; raises WeightsError with a table."""
    resolved = plan.resolved
    slots = new_slots(model)
    if not slots:
        raise WeightsError(
            f"{checkpoint.path}: the design of {plan.name} has no parameters of its own that could be loaded, and the model "
            "keeps the weights it has; set weights=null"
        )
    foreign = [key for key in checkpoint if INSIDE not in key]
    if foreign:
        raise WeightsError(
            f"{checkpoint.path}: {len(foreign)} of its {len(checkpoint)} tensors are not of a design inside a model "
            f"({listed(foreign[:3])}{' …' if len(foreign) > 3 else ''}). A model that is loaded keeps its weights: `weights` "
            "names the new parameters of the recipe's design alone, as save(model, directory, parts='new') writes them"
        )
    backbone = resolved.backbone.name
    found = match(
        checkpoint,
        {slot.name: slot.entry() for slot in slots},
        backbone=backbone,
        model=f"the design of {plan.name} ({backbone})",
        layout=layout,
        whole=True,
        own_names=True,
    )
    layers: dict[int, set[str]] = {}
    for layer, path in enumerate(resolved.backbone.paths()):  # type: ignore[attr-defined]
        if names := {name for name in found.reused if name.startswith(f"{path}.")}:
            layers[layer] = names
    require_same_meaning(checkpoint, found, resolved.attention, resolved.sites, layers)
    return found


def load_new(plan: Plan, model: nn.Module, path: Path, layout: str = "auto") -> Match:
    """Put the new parameters at `path` into `model`, in the types and on the devices that it has; all or none.

    Raises WeightsError with a table when they are not exactly those of the design, UsageError for a model without memory.
    """
    with open_checkpoint(path) as checkpoint, torch.no_grad():
        found = match_new(plan, model, checkpoint, layout)
        slots = new_slots(model)
        if any(slot.get().is_meta for slot in slots):
            raise UsageError(f"this model is on the meta device and cannot take the weights of {path}; load it first")
        for slot in slots:
            slot.get().copy_(checkpoint.tensor(found.reused[slot.name]))
    return found
