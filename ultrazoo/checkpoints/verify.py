"""What a checkpoint is: digests, layout, element types, and whether it fits a recipe or is whole by itself.

So that anybody who has a released file can tell whether it is the file that others speak of, before anything is built.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import assemble
from ..backbones.adapted import AdaptedSpec
from ..errors import WeightsError
from ..weights import digest
from ..weights.keymaps import Format
from ..weights.match import Match, collapse, detect, match
from ..weights.meaning import require_same_meaning
from ..weights.own import is_new_only, match_new
from ..weights.reader import Checkpoint, open_checkpoint
from ..weights.slots import attention_paths, slots_of
from .source import understood

if TYPE_CHECKING:
    from ..recipe import Plan

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Verified:
    """Facts of a checkpoint. `files` are (name, bytes, sha256); `tensors_sha256` is the same for the same tensors in any
    layout; `problem` says why it does not fit `model`, the recipe's or the one its own sizes describe, empty when it does."""

    path: str
    files: tuple[tuple[str, int, str], ...]
    tensors_sha256: str
    format: str | None
    prefix: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    model: str
    match: Match | None
    problem: str
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problem

    def data(self) -> dict[str, Any]:
        found = self.match
        return {
            "path": self.path,
            "files": [{"file": name, "bytes": size, "sha256": sha256} for name, size, sha256 in self.files],
            "tensors_sha256": self.tensors_sha256,
            "format": self.format,
            "prefix": self.prefix,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "model": self.model,
            "fits": self.fits,
            "problem": self.problem,
            "reused": len(found.reused) if found is not None else 0,
            "new": collapse(found.new) if found is not None else [],
            "dropped": collapse(found.dropped) if found is not None else [],
            "notes": list(self.notes),
        }


def verify(path: str | os.PathLike[str], plan: Plan | None = None, *, progress: Progress | None = None) -> Verified:
    """Read every byte of the checkpoint at `path` and hold it against `plan`, or where None against its own sizes.

    Raises WeightsError only for what cannot be opened at all; what does not fit is told in the result.
    """
    with open_checkpoint(path) as checkpoint:
        form, prefix, problem = _format(checkpoint)
        model, found, notes = "", None, ()
        adapted = plan is not None and isinstance(plan.resolved.backbone, AdaptedSpec)
        if form is not None or adapted:
            problem = ""
            try:
                model, found, notes = _held(checkpoint, plan)
            except WeightsError as error:
                problem = str(error)
                model = model or (_called(plan) if plan is not None else "")
        done, total = 0, sum(file.stat().st_size for file in checkpoint.files)
        total += sum(entry.nbytes for entry in checkpoint.entries.values())

        def count(size: int, name: str) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total, name)

        # files of other libraries' models have no layout of their own to be told by: the recipe says it
        named, before = form.name if form is not None else None, prefix
        if found is not None:
            named, before = found.format, found.prefix
        dtypes: Counter[str] = Counter()
        for entry in checkpoint.entries.values():
            dtypes[str(entry.dtype).removeprefix("torch.")] += entry.numel
        return Verified(
            str(checkpoint.path),
            tuple((file.name, file.stat().st_size, digest.of_file(file, count)) for file in checkpoint.files),
            digest.of_tensors(checkpoint, form, prefix, count),
            named,
            before,
            len(checkpoint),
            sum(dtypes.values()),
            dict(dtypes.most_common()),
            model,
            found,
            problem,
            notes,
        )


def _format(checkpoint: Checkpoint) -> tuple[Format | None, str, str]:
    try:
        return *detect(checkpoint), ""
    except WeightsError as error:
        return None, "", str(error)


def _held(checkpoint: Checkpoint, plan: Plan | None) -> tuple[str, Match, tuple[str, ...]]:
    """What the model is called, how the checkpoint fits it, and what was taken for granted; raises WeightsError."""
    own = plan is None
    notes: tuple[str, ...] = ()
    if plan is None:
        plan, notes, _ = understood(checkpoint, whole=False)
    model = assemble.skeleton(plan)
    resolved = plan.resolved
    if is_new_only(checkpoint) and isinstance(resolved.backbone, AdaptedSpec):
        return _called(plan), match_new(plan, model, checkpoint), notes
    found = match(
        checkpoint,
        {slot.name: slot.entry() for slot in slots_of(model) if slot.saved},
        backbone=resolved.backbone.name,
        model=_called(plan),
        extras=() if own else attention_paths(model),
        whole=own,
        own_names=isinstance(resolved.backbone, AdaptedSpec),
    )
    if not own:
        require_same_meaning(checkpoint, found, resolved.attention, resolved.sites)
    return _called(plan), found, notes


def _called(plan: Plan) -> str:
    return f"{plan.name} ({plan.resolved.backbone.name})"
