"""Convert a checkpoint between the layouts of diffusers, the original Wan, released UltraGen files and our own.

Every tensor keeps its bits and its type; only its name and its place change. What has no place in the other layout is an
error with a table, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import assemble
from ..backbones.wan import WanSpec
from ..errors import UsageError, WeightsError, listed, near
from ..spec import BackboneSpec
from ..weights import foreign
from ..weights.disk import check_space, write_bytes
from ..weights.keymaps import FORMATS, Format
from ..weights.match import Row, table_lines
from ..weights.meaning import by_layer, require_released
from ..weights.pickled import SUFFIXES
from ..weights.slots import Slot, slots_of, stream
from ..weights.staging import refuse_existing, staged, staged_file
from ..weights.tensors import Entry
from ..weights.torchfile import write_torch_file
from ..weights.writer import SHARD_BYTES, Progress, Written, header_room, order, write_checkpoint, write_file
from .lora import with_lora
from .merge import Merging, merged_plan
from .source import Source, opened, require_heads

if TYPE_CHECKING:
    from ..recipe import Plan

    Pages = Callable[[Plan, Mapping[str, Any]], assemble.ExtraFiles]

TORCH_FILES = tuple(suffix for suffix in SUFFIXES if suffix != ".bin")
FILES = (".safetensors", *TORCH_FILES)


@dataclass(frozen=True)
class Converted:
    """What was read and written. `notes` say what nobody's file decided, or what the new layout does not hold."""

    source: str
    origin: str
    prefix: str
    format: str
    out: str
    files: tuple[Written, ...]
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    notes: tuple[str, ...]
    plan: Plan
    merged_from: Plan | None = None

    def data(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "from": self.origin,
            "prefix": self.prefix,
            "to": self.format,
            "out": self.out,
            "files": [one.data() for one in self.files],
            "tensors": self.tensors,
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "notes": list(self.notes),
            **({} if self.merged_from is None else {"before": _priced(self.merged_from), "after": _priced(self.plan)}),
        }


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    overrides: Sequence[str] = (),
    lora: str | os.PathLike[str] | None = None,
    merge: bool = False,
    force: bool = False,
    limit: int = SHARD_BYTES,
    progress: Progress | None = None,
    extra_files: Pages | None = None,
) -> Converted:
    """Write the checkpoint at `source` in the layout `to`: a directory, or one file where `out` ends like one.

    A directory holds safetensors (sharded above `limit` bytes) and the ``config.json`` of the program that reads it; for
    ``ultrazoo`` it is what `from_pretrained` opens, with the `extra_files` of its plan and origin beside. A file ends in ``.safetensors``, or in
    ``.ckpt``, ``.pt`` or ``.pth`` for a torch file of a plain state dict. `overrides` (``key=value``) correct the recipe
    made from the tensors' shapes. `lora` is a LoRA in peft's layout to add to the weights it names. With `merge` (``to`` is
    ``ultrazoo``) every ``adapt: lora`` becomes ``adapt: own``, in weights and recipe. Raises WeightsError with a table of what does not fit, OutputError.
    """
    if to not in FORMATS:
        hint = near(to, FORMATS)
        raise UsageError(f"--to is one of {listed(sorted(FORMATS))}, got {to!r}" + (f"; {hint}" if hint else ""))
    place = Path(out)
    single = place.suffix in FILES
    if single and to == "ultrazoo":
        raise UsageError(f"the format ultrazoo is a directory with its recipe; {place} is named like a file")
    if merge and to != "ultrazoo":
        raise UsageError(f"merged LoRAs are projections that the format {to} has no place for; use --to ultrazoo")
    if not single:
        refuse_existing(Path(os.path.realpath(out)), force)
    with opened(source, overrides) as found:
        _refuse_itself(found, place)
        if lora is not None:
            found = with_lora(found, lora)
        if to == "ultrazoo":
            return _to_ours(found, place, merge, force, progress, extra_files)
        names = _renamed(found, FORMATS[to])
        slots = {names[slot.name]: slot for slot in found.slots}
        entries = order([Entry(key, slot.shape, found.entry(slot.name).dtype) for key, slot in slots.items()])
        tensors = _tensors(found, [(entry.name, slots[entry.name]) for entry in entries])
        if single:
            written = [_one_file(place, entries, tensors, force, progress)]
        else:
            written = _directory(found, place, to, entries, tensors, force, limit, progress)
        return _report(found, to, place, written, entries, _lost(found, to))


def _tensors(found: Source, rows: Sequence[tuple[str, Slot]]) -> Iterator[tuple[str, Tensor]]:
    """(their key, tensor) in the order of `rows`."""
    keys = iter(rows)
    for _, tensor in stream([slot for _, slot in rows], lambda slot: found.tensor(slot.name)):
        yield next(keys)[0], tensor


def _refuse_itself(found: Source, out: Path) -> None:
    for file in found.checkpoint.files:
        if out.exists() and (file.samefile(out) or (out.is_dir() and file.resolve().parent == out.resolve())):
            raise UsageError(f"{out} holds the checkpoint that is read; choose another place")


def _renamed(found: Source, form: Format) -> dict[str, str]:
    """Our names → keys of `form`; raises WeightsError with a table of what has no place there, or is due there."""
    backbone = found.plan.resolved.backbone
    if form.backbone not in (None, backbone.name):
        raise WeightsError(
            f"{found.checkpoint.path} is a model of backbone {backbone.name!r}; the format {form.name} is of "
            f"{form.backbone!r}; nothing was written"
        )
    names, rows = {}, []
    for slot in found.slots:
        key = form.theirs(slot.name)
        if key is None:
            rows.append(("no place", found.match.reused[slot.name], str(slot.shape), ""))
        else:
            names[slot.name] = key
    rows += _incomplete(names, form)
    if rows:
        head = f"{found.checkpoint.path} ({found.match.format}) does not fit the format {form.name}: "
        lines = [f"{head}{len(rows)} tensors differ, nothing was written", *table_lines(rows, due="format")]
        if design := form.design or FORMATS[found.match.format].design:
            lines.append(f"  extra weights belong to the design {design}")
        raise WeightsError("\n".join(lines))
    if form.design:
        extra = by_layer(names)
        if not extra:
            raise WeightsError(
                f"{found.checkpoint.path} has none of the extra weights of the format {form.name}; without them it is a "
                "checkpoint of the format wan: use --to wan"
            )
        require_released(found.checkpoint.path, list(names), found.plan.resolved.attention, found.plan.resolved.sites)
    return names


def _incomplete(names: Mapping[str, str], form: Format) -> list[Row]:
    """Rows for extra parameters that the format has in each layer with its design, and that are not here."""
    return [
        ("missing", form.theirs(due) or due, "", "")
        for layer in by_layer(names)
        for due in form.extras(layer)
        if due not in names
    ]


def _lost(found: Source, to: str) -> tuple[str, ...]:
    """What the foreign layout does not hold."""
    notes = [note for note in found.notes if "heads" in note]
    if found.match.format == "ultrazoo" and not found.notes:
        notes.append(f"the recipe is not part of the format {to}: keep it to read these weights as they were meant")
    return tuple(notes)


def _one_file(
    out: Path, entries: list[Entry], tensors: Iterator[tuple[str, Tensor]], force: bool, progress: Progress | None
) -> Written:
    total = sum(entry.nbytes for entry in entries)

    def report(done: int, key: str) -> None:
        if progress is not None:
            progress(done, total, key)

    with staged_file(out, force=force) as path:
        check_space(path.parent, total + header_room(entries))
        if out.suffix in TORCH_FILES:
            return write_torch_file(path, entries, tensors, report=report)
        return write_file(path, entries, tensors, report=report)


def _directory(
    found: Source,
    out: Path,
    to: str,
    entries: list[Entry],
    tensors: Iterator[tuple[str, Tensor]],
    force: bool,
    limit: int,
    progress: Progress | None,
) -> list[Written]:
    if to != "ultragen":
        require_heads(found, f"the config.json of the format {to}")
    spec = found.plan.resolved.backbone
    with staged(out, force=force) as new:
        # the released UltraGen code reads no config; a stand-in for the heads would only mislead
        if found.heads_known:
            came_from = {"from": found.match.format, "file": found.checkpoint.path.name}
            write_bytes(new / "config.json", foreign.config_text(to, _wan(spec), came_from))
        stem = foreign.STEMS[to]
        return write_checkpoint(new, entries, tensors, stem=stem, limit=limit, progress=progress)


def _wan(spec: BackboneSpec) -> WanSpec:
    assert isinstance(spec, WanSpec), "foreign layouts are of Wan"
    return spec


def _to_ours(
    found: Source, out: Path, merge: bool, force: bool, progress: Progress | None, extra_files: Pages | None
) -> Converted:
    require_heads(found, "a recipe")
    plan, slots = found.plan, found.slots
    get: Source | Merging = found
    origin = {"seed": plan.resolved.seed, "weights": found.match.data()}
    if merge:
        plan = merged_plan(plan)
        merged = assemble.skeleton(plan)
        get = Merging(found.model, merged, {slot.name: found.entry(slot.name) for slot in slots}, found.tensor)
        slots = [slot for slot in slots_of(merged) if slot.saved]
        origin["merged"] = found.plan.hash
    written = assemble.write_directory(
        plan,
        slots,
        lambda slot: get.entry(slot.name),
        lambda slot: get.tensor(slot.name),
        origin,
        out,
        force,
        progress,
        extra_files and extra_files(plan, origin),
    )
    done = _report(found, "ultrazoo", out, written, [get.entry(slot.name) for slot in slots], found.notes)
    return replace(done, plan=plan, merged_from=found.plan) if merge else done


def _priced(plan: Plan) -> dict[str, Any]:
    """What merging changes of a plan; FLOPs are of one forward at its size."""
    totals = plan.totals
    flops = totals.attention_flops + totals.projection_flops + totals.other_flops
    return {"hash": plan.hash, "parameters": totals.parameters, "flops": flops}


def _report(
    found: Source, to: str, out: Path, written: Sequence[Written], entries: Sequence[Entry], notes: tuple[str, ...]
) -> Converted:
    return Converted(
        str(found.checkpoint.path),
        found.match.format,
        found.match.prefix,
        to,
        str(out),
        tuple(written),
        len(entries),
        sum(entry.numel for entry in entries),
        tuple(sorted({_type(entry.dtype) for entry in entries})),
        (*found.done, *notes),
        found.plan,
    )


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
