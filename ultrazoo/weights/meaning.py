"""Whether a block reads extra weights as the block that they come from did.

Two branched attentions may have parameters of the same names and shapes and mean different things by them: gates mix in
another order, keys start from another matrix. Weights that would be misread are refused. What a file's weights mean is
known of the released UltraGen checkpoints (`ultragen`, ``variant: released``) and of our own directories, which hold
their recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import recipe
from ..attention.branched import BranchedSpec, module_name
from ..attention.ultragen import UltraGenSpec
from ..errors import UltrazooError, WeightsError
from ..options import to_data
from ..spec import AttentionSpec, Site
from . import config
from .keymaps import FORMATS
from .match import Match, collapse
from .reader import Checkpoint
from .staging import is_ours

RELEASED = UltraGenSpec(variant="released", full_first=0, full_last=0)


def require_same_meaning(
    checkpoint: Checkpoint,
    found: Match,
    attention: Sequence[AttentionSpec],
    sites: Sequence[Site],
    layers: Mapping[int, set[str]] | None = None,
) -> None:
    """Raise WeightsError for every layer that would misread the extra weights it reuses. `attention` is expanded.

    `layers` are the extra parameters of each layer where their names do not begin with its number.
    """
    layers = by_layer(found.reused) if layers is None else layers
    if not layers or (written := _written(checkpoint, found.format)) is None:
        return
    theirs = {layer: written(sites[layer]) for layer in layers}
    if wrong := _misread(theirs, {layer: attention[layer] for layer in layers}, layers):
        lines = [f"{checkpoint.path} ({found.format}) holds weights that this recipe would misread; nothing was loaded"]
        lines += [f"  {where}   the weights belong to {due}, got {got}" for where, due, got in wrong]
        if found.format in FORMATS and (design := FORMATS[found.format].design):
            lines.append(f"  the design they belong to is {design}")
        raise WeightsError("\n".join(lines))


def require_released(
    path: Path, names: Sequence[str], attention: Sequence[AttentionSpec], sites: Sequence[Site]
) -> None:
    """Raise WeightsError for every layer whose extra weights `names` a reader of released UltraGen files would misread."""
    layers = by_layer(names)
    ours = {layer: attention[layer] for layer in layers}
    released = {layer: RELEASED.expand(sites[layer]) for layer in layers}
    if wrong := _misread(ours, released, layers):
        lines = [f"the design of {path} is not the one that the format ultragen stands for; nothing was written"]
        lines += [f"  {where}   the format means {got}, the weights belong to {due}" for where, due, got in wrong]
        raise WeightsError("\n".join(lines))


def by_layer(names: Iterable[str]) -> dict[int, set[str]]:
    """Layer → those of `names` that are extra parameters of its attention."""
    layers: dict[int, set[str]] = {}
    for name in names:
        steps = name.split(".")
        if "attention" in steps and steps[0] == "blocks":
            layers.setdefault(int(steps[1]), set()).add(name)
    return dict(sorted(layers.items()))


def _misread(
    written: Mapping[int, AttentionSpec | None], read: Mapping[int, AttentionSpec], layers: Mapping[int, set[str]]
) -> list[tuple[str, str, str]]:
    """(path in the recipe, what the weights belong to, how they would be read) of what differs, layers in ranges."""
    wrong: dict[tuple[str, str, str], list[str]] = {}
    for layer, names in layers.items():
        theirs, ours = written[layer], read[layer]
        if not isinstance(theirs, BranchedSpec) or not isinstance(ours, BranchedSpec):
            continue
        due, got = _readings(theirs, names), _readings(ours, names)
        for path in due:
            if due[path] != got.get(path):
                row = (path, json.dumps(due[path]), json.dumps(got.get(path)))
                wrong.setdefault(row, []).append(f"attention.{layer}.{path}")
    return [(collapse(where)[0], due, got) for (_, due, got), where in wrong.items()]


def _readings(spec: BranchedSpec, names: set[str]) -> dict[str, Any]:
    """What decides how the reused parameters `names` of one block are read, by path in the recipe."""
    found: dict[str, Any] = {}
    if any(".fuse." in name for name in names):
        fuse: Mapping[str, Any] = to_data(spec.fuse)
        found |= {f"fuse.{key}": value for key, value in fuse.items() if key not in ("init", "weights", "learned")}
        if "order" not in fuse:
            # one number or row per branch, in this order
            found["branches"] = list(spec.branches)
    for name, branch in spec.branches.items():
        if any(f".branches.{module_name(name)}.adapt." in one for one in names):
            found[f"branches.{name}.adapt.key_from"] = getattr(branch.adapt, "key_from", None)
    return found


def _written(checkpoint: Checkpoint, layout: str) -> Callable[[Site], AttentionSpec | None] | None:
    """Site → the attention that the file's weights of that layer were made for; None where nobody knows."""
    if layout == "ultragen":
        return RELEASED.expand
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if not is_ours(directory):
        return None
    specs = _stored(directory)
    return lambda site: specs[site.layer] if site.layer < len(specs) else None


def _stored(directory: Path) -> tuple[AttentionSpec, ...]:
    content = config.read(directory)
    config.require_plugins(directory, content["plugins"])
    try:
        return recipe.resolve(recipe.load(content["recipe"])).attention
    except UltrazooError as error:
        raise WeightsError(f"cannot tell what the weights in {directory} mean: {error}") from error
