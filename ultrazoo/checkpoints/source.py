"""A checkpoint and the model that it is of: the recipe it was saved with, or one made from the shapes of its tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .. import assemble, recipe
from ..errors import WeightsError
from ..weights import config
from ..weights.infer import infer
from ..weights.match import Match, detect, match
from ..weights.reader import Checkpoint, open_checkpoint
from ..weights.slots import Slot, slots_of
from ..weights.staging import is_ours
from ..weights.tensors import Entry

if TYPE_CHECKING:
    from ..recipe import Plan


@dataclass(frozen=True)
class Source:
    """An open checkpoint that is whole: every parameter of `model` (on the meta device) is in it, and nothing else.

    `notes` say what of the plan no file decided; `heads_known` whether somebody said how many heads there are.
    """

    checkpoint: Checkpoint
    plan: Plan
    model: nn.Module
    match: Match
    notes: tuple[str, ...]
    heads_known: bool
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """What is done to tensors on their way, by our name; shape and type stay."""
    done: tuple[str, ...] = ()
    """The same in words."""

    def entry(self, name: str) -> Entry:
        """Shape and type of the parameter `name`, as the file has it."""
        stored = self.checkpoint.entries[self.match.reused[name]]
        return Entry(name, stored.shape, stored.dtype)

    def tensor(self, name: str) -> Tensor:
        """The parameter `name` on the CPU; it may be the file's own memory."""
        tensor = self.checkpoint.tensor(self.match.reused[name])
        return self.changes[name](tensor) if name in self.changes else tensor

    @property
    def slots(self) -> list[Slot]:
        """What is saved of the model, in its order."""
        return [slot for slot in slots_of(self.model) if slot.saved]


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Iterator[Source]:
    """Open the checkpoint at `path` and find out what model it is of; `overrides` (``key=value``) correct its recipe.

    Raises WeightsError with a table when the checkpoint is not whole or not of one model, RecipeError for overrides that
    do not go with it.
    """
    with open_checkpoint(path) as checkpoint:
        plan, notes, known = understood(checkpoint, overrides)
        model = assemble.skeleton(plan)
        slots = [slot for slot in slots_of(model) if slot.saved]
        found = match(
            checkpoint,
            {slot.name: slot.entry() for slot in slots},
            backbone=plan.resolved.backbone.name,
            model=f"the {plan.resolved.backbone.name} that its own sizes describe" if notes else plan.name,
            whole=True,
        )
        yield Source(checkpoint, plan, model, found, notes, known)


def understood(
    checkpoint: Checkpoint, overrides: Sequence[str] = (), *, whole: bool = True
) -> tuple[Plan, tuple[str, ...], bool]:
    """The plan of the model that a checkpoint is of, notes on what was taken for granted, and whether heads are known.

    With `whole` a directory of a design's new parameters alone is refused.
    """
    directory = checkpoint.path.parent
    form, prefix = detect(checkpoint)
    if form.name == "ultrazoo" and is_ours(directory):
        content = config.read(directory)
        if whole and config.holds_new(content):
            raise WeightsError(
                f"{directory} holds the new parameters of a design alone, which are no whole checkpoint: a recipe's `weights` "
                "names them, and apply puts them into the model that they were trained in"
            )
        config.require_plugins(directory, content["plugins"])
        config.require_files(directory, content["weights"])
        return recipe.make_plan(recipe.resolve(recipe.load(content["recipe"], overrides))), (), True
    if form.name == "ultrazoo" and any(".attention." in key for key in checkpoint):
        raise WeightsError(
            f"{checkpoint.path} has extra weights of a design of ours and no {config.FILE} that tells which: give the "
            "directory that build or save wrote, or load it by `weights:` in the design's recipe"
        )
    found = infer(checkpoint, form, prefix)
    known = found.heads_known or any(one.startswith("backbone.heads=") for one in overrides)
    plan = recipe.make_plan(recipe.resolve(recipe.load(found.recipe, overrides)))
    return plan, found.notes, known


def require_heads(source: Source, why: str) -> None:
    """Raise WeightsError unless the number of heads is known, which `why` needs."""
    if not source.heads_known:
        raise WeightsError(
            f"{source.checkpoint.path}: no tensor tells the number of heads and no config.json is beside it; {why} needs "
            "it: add backbone.heads=N"
        )
