"""`ultrazoo.save`: a model's directory as model hubs lay it out, with a card beside configuration and weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from .. import assemble
from .modelcard import card

if TYPE_CHECKING:
    from torch import nn


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    parts: Literal["all", "new"] = "all",
    force: bool = False,
    progress: assemble.Progress | None = None,
    extra_files: assemble.ExtraFiles | None = None,
) -> None:
    """Write a built model as a directory that `from_pretrained` opens, every tensor bit for bit, in the type it has.

    It holds ``config.json``, ``model.safetensors`` (above 4 GB: shards and ``model.safetensors.index.json``), ``README.md``,
    the recipe and the plan; `extra_files` (name to function giving bytes) are added, and may replace the README. An
    existing directory is refused unless `force`. With ``parts="new"`` it holds what `apply` added to a loaded model and nothing
    of the model itself: `weights` of a recipe names it when that is applied again. Raises UsageError for a model without a plan or whose parameters are not
    the plan's (adapters must be merged or removed first), OutputError when the place cannot be written.
    """
    _, plan, origin = assemble.planned(model)
    files = {"README.md": lambda: card(plan, origin=origin, report=False, parts=parts).encode(), **(extra_files or {})}
    assemble.save(model, directory, parts=parts, force=force, progress=progress, extra_files=files)
