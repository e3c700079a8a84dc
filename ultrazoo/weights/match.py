"""Hold a checkpoint against a model: what is reused, new and dropped, or the table of what does not fit.

The rule: the backbone's own parameters must all be in the file, with their shapes, and the file must hold no others.
Extra parameters of attention blocks may be new (they start as the design says) or dropped, part by part: a part
(``branches.global_``, ``fuse``) is in the file whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import WeightsError, listed, near
from .keymaps import FORMATS, PREFIXES, Format, beginnings, strip_prefix
from .reader import Checkpoint
from .tensors import PLAIN, Entry

KINDS = ("wrong shape", "wrong type", "missing", "unexpected", "no place")

INSIDE = ".processor."
"""Stands in the names of a design's parameters inside a model of another library, and in none of the model's own."""

Row = tuple[str, str, str, str]
"""One tensor that does not fit: kind, key, what the file has, what the model wants."""

ROWS = 8
"""Rows of each kind in a mismatch table at most; a row stands for the same parameter of many layers."""


@dataclass(frozen=True)
class Match:
    """Which key of the file each of our parameters comes from.

    `reused` maps our name to the key in the file; `new` are our names that the file has nothing for; `dropped` are keys
    of the file that the model has no place for.
    """

    path: str
    format: str
    prefix: str
    reused: Mapping[str, str]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """The report as plain data, for config.json."""
        return {
            "path": self.path,
            "format": self.format,
            "prefix": self.prefix,
            "reused": len(self.reused),
            "new": collapse(self.new),
            "dropped": collapse(self.dropped),
        }

    def __str__(self) -> str:
        behind = f", keys behind the prefix {self.prefix!r}" if self.prefix else ""
        lines = [f"weights of {self.path} ({self.format}{behind}): {len(self.reused)} tensors reused"]
        lines += [f"  new       {row}" for row in collapse(self.new)]
        lines += [f"  dropped   {row}" for row in collapse(self.dropped)]
        return "\n".join(lines)


def detect(checkpoint: Checkpoint, layout: str = "auto") -> tuple[Format, str]:
    """The format of a checkpoint and the prefix before its keys; raises WeightsError when `layout` is another one."""
    if layout not in ("auto", *FORMATS):
        hint = near(layout, FORMATS)
        raise WeightsError(
            f"unknown format {layout!r}; formats are auto, {listed(FORMATS)}" + (f"; {hint}" if hint else "")
        )
    prefix = strip_prefix(checkpoint)
    keys = [key[len(prefix) :] for key in checkpoint]
    if "ultrazoo" in checkpoint.metadata:
        found: Format | None = FORMATS["ultrazoo"]
    else:
        found = next((known for known in FORMATS.values() if known.recognises(keys)), None)
    if layout == "auto":
        if found is None:
            raise WeightsError(
                f"{checkpoint.path} is of no known format ({listed(FORMATS)}); it holds {len(keys)} tensors, "
                f"{listed(keys[:4])} …; {_advice(list(checkpoint))}"
            )
        return found, prefix
    asked = FORMATS[layout]
    # our own files without extra parameters have the original names
    same = found is None or found is asked or {found.name, layout} == {"ultrazoo", "wan"}
    if not same:
        assert found is not None
        raise WeightsError(
            f"{checkpoint.path} has the keys of format {found.name!r}, not of {layout!r}; say format: auto"
        )
    return asked, prefix


def _advice(keys: Sequence[str]) -> str:
    """What to do about keys that no format knows: often they are known ones behind a prefix."""
    known = [
        (first, count)
        for first, count in beginnings(keys).items()
        if any(
            form.recognises(key.removeprefix(first) for key in keys if key.startswith(first))
            for form in FORMATS.values()
        )
    ]
    wrappers = listed(repr(one) for one in PREFIXES if one)
    if not known:
        return "give weights.format where you know it"
    if len(known) == 1 and known[0][1] == len(keys):
        return (
            f"every key has the prefix {known[0][0]!r}, which is none of those taken off ({wrappers}); rename the keys"
        )
    models = listed(f"{first!r} ({count} tensors)" for first, count in known)
    rest = len(keys) - sum(count for _, count in known)
    beside = f" and {rest} others beside" if rest else ""
    return f"a model stands behind {models}{beside}: save the one you mean alone, without its prefix"


def match(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Entry],
    *,
    backbone: str,
    model: str,
    extras: Sequence[str] = (),
    layout: str = "auto",
    whole: bool = False,
    own_names: bool = False,
) -> Match:
    """Pair the model's `parameters` with the checkpoint's keys.

    `backbone` is the registered name and `model` what to call the model in messages; `extras` are the module paths of
    attention blocks, whose parameters may be new. With `whole` nothing may be new or dropped. `own_names`: the model is of
    another library, whose files have the model's own names. Raises WeightsError with a table when anything does not fit.
    """
    form, prefix = _own(checkpoint, parameters, backbone, layout) if own_names else detect(checkpoint, layout)
    if form.backbone not in (None, backbone):
        raise WeightsError(
            f"{checkpoint.path} is a {form.name} checkpoint, for backbone {form.backbone!r}, not {backbone!r}"
        )
    found = {}
    unknown = []
    for key in checkpoint:
        ours = form.ours(key[len(prefix) :])
        if ours is None:
            unknown.append(key)
        else:
            found[_placed(ours, parameters)] = key
    split = _Split(extras, whole, own_names)
    rows: list[Row] = [("unexpected", key, _facts(checkpoint.entries[key]), "") for key in unknown]
    reused, new, dropped = {}, [], []
    for name, key in found.items():
        if name in parameters:
            continue
        if split.is_extra(name):
            dropped.append(key)
        else:
            rows.append(("unexpected", key, _facts(checkpoint.entries[key]), ""))
    for name, due in parameters.items():
        if name not in found:
            if split.is_extra(name):
                new.append(name)
            else:
                rows.append(("missing", prefix + (form.theirs(name) or name), "", _facts(due)))
            continue
        got = checkpoint.entries[found[name]]
        if got.shape != due.shape:
            rows.append(("wrong shape", found[name], str(got.shape), str(due.shape)))
        elif got.dtype not in PLAIN if due.dtype.is_floating_point else got.dtype != due.dtype:
            rows.append(("wrong type", found[name], _type(got), _type(due)))
        else:
            reused[name] = found[name]
    rows += _torn(split, checkpoint, found, parameters, new)
    if rows:
        raise WeightsError(_table(checkpoint, form, model, rows))
    return Match(str(checkpoint.path), form.name, prefix, reused, tuple(new), tuple(dropped))


def _own(checkpoint: Checkpoint, parameters: Mapping[str, Entry], backbone: str, layout: str) -> tuple[Format, str]:
    """The format whose names are the model's own, and the prefix before the keys."""
    if layout not in ("auto", "ultrazoo", backbone):
        raise WeightsError(
            f"weights.format {layout!r} is none of backbone {backbone!r}, whose checkpoints have the model's own names; "
            "say format: auto"
        )
    prefix = "" if any(key in parameters for key in checkpoint) else strip_prefix(checkpoint)
    return Format(backbone, "the model's own names", FORMATS["ultrazoo"].rows, ()), prefix


def _placed(name: str, parameters: Mapping[str, Entry]) -> str:
    """`name`, or its place when a layer has or had alternatives for other sampling steps: those keep theirs in `base`."""
    for old, new in ((".attention.", ".attention.base."), (".attention.base.", ".attention.")):
        # a host of another library may be called attention itself
        at = max(name.find(INSIDE), 0)
        moved = name[:at] + name[at:].replace(old, new, 1)
        if name not in parameters and moved in parameters:
            return moved
    return name


class _Split:
    """Which names are extra parameters of attention blocks, and of which part of the block."""

    def __init__(self, extras: Sequence[str], whole: bool, own_names: bool):
        self._extras = tuple(f"{path}." for path in extras)
        self._whole = whole
        self._own_names = own_names

    def is_extra(self, name: str) -> bool:
        if self._whole:
            return False
        inside = INSIDE in name if self._own_names else "attention" in name.split(".")[:-1]
        return inside or name.startswith(self._extras)

    def part(self, name: str) -> str:
        """``blocks.3.attention.fuse.gates.0.2.bias`` → ``blocks.3.attention.fuse``."""
        steps = name.split(".")[:-1]
        start = steps.index("attention") + 1 if "attention" in steps else 0
        for place in range(start, len(steps)):
            if steps[place] == "branches":
                return ".".join(steps[: place + 2])
            if steps[place] in ("fuse", "far_field", "selector"):
                return ".".join(steps[: place + 1])
        return ".".join(steps)


def _torn(
    split: _Split, checkpoint: Checkpoint, found: Mapping[str, str], parameters: Mapping[str, Entry], new: Sequence[str]
) -> list[Row]:
    """Rows for parts of an attention block of which the file holds some parameters and not others, or more."""
    common = {split.part(name) for name in found if name in parameters and split.is_extra(name)}
    rows = [("missing", name, "", _facts(parameters[name])) for name in new if split.part(name) in common]
    rows += [
        ("unexpected", key, _facts(checkpoint.entries[key]), "")
        for name, key in found.items()
        if name not in parameters and split.is_extra(name) and split.part(name) in common
    ]
    return rows


def _facts(entry: Entry) -> str:
    return str(entry.shape)


def _type(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _table(checkpoint: Checkpoint, form: Format, model: str, rows: Sequence[Row]) -> str:
    lines = [f"{checkpoint.path} ({form.name}) does not fit {model}: {len(rows)} tensors differ, nothing was loaded"]
    lines += table_lines(rows)
    if form.design:
        lines.append(f"  its extra weights belong to the design {form.design}")
    return "\n".join(lines)


def table_lines(rows: Sequence[Row], got: str = "file", due: str = "model") -> list[str]:
    """Rows of a mismatch table, one line for the same parameter of many layers, the kinds in the order of `KINDS`.

    `got` and `due` name the two sides whose facts a row holds.
    """
    groups: dict[Row, list[str]] = {}
    for kind, key, has, wants in rows:
        groups.setdefault((kind, _shape_of(key), has, wants), []).append(key)
    cells = []
    # what differs in most layers says most
    for (kind, _, has, wants), keys in sorted(groups.items(), key=lambda group: -len(group[1])):
        count = f"{len(keys)} tensors" if len(keys) > 1 else ""
        cells.append((kind, collapse(keys)[0], f"{got} {has}" if has else "", f"{due} {wants}" if wants else "", count))
    by_kind = {kind: [row for row in cells if row[0] == kind] for kind in KINDS}
    shown = [row for found in by_kind.values() for row in found[:ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in range(4)]
    lines = []
    for kind, found in by_kind.items():
        for row in found[:ROWS]:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
            lines.append(f"  {line}  {row[4]}".rstrip())
        if len(found) > ROWS:
            lines.append(f"  {kind}  … and {len(found) - ROWS} more rows")
    return lines


_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def _shape_of(key: str) -> str:
    return _NUMBER.sub("#", key, count=1)


def collapse(keys: Sequence[str]) -> list[str]:
    """Keys with their first number written as ranges: ``blocks.0-29.ffn.0.bias``."""
    groups: dict[str, list[int]] = {}
    for key in keys:
        number = _NUMBER.search(key)
        groups.setdefault(_shape_of(key), []).extend([int(number.group())] if number else [])
    return [pattern.replace("#", _ranges(numbers), 1) for pattern, numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
