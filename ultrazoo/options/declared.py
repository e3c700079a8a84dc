"""What a spec or options class declares, and the words that error messages and `describe` use for it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from ..errors import listed
from ..grid import Grid
from ..spec import Data

BOUNDS = ("ge", "gt", "le", "lt")


@dataclass(frozen=True)
class Declared:
    """One option as its class declares it. `default` is `dataclasses.MISSING` for an option that must be given."""

    name: str
    annotation: Any
    default: Any
    doc: str
    kind: str | None
    choices: Mapping[str, type] | None
    bounds: tuple[tuple[str, float], ...]

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


@cache
def declared(cls: type) -> tuple[Declared, ...]:
    """The options of a spec or options class, in the order written."""
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        meta = field.metadata
        bounds = tuple((key, meta[key]) for key in BOUNDS if meta.get(key) is not None)
        rows.append(
            Declared(
                field.name,
                hints[field.name],
                default,
                meta.get("doc", ""),
                meta.get("kind"),
                meta.get("choices"),
                bounds,
            )
        )
    return tuple(rows)


def got(data: Any) -> str:
    """A value as an error message shows it: JSON, cut short."""
    try:
        text = json.dumps(data, default=repr, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."


def expected(row: Declared) -> str:
    """What an option takes, in words."""
    if row.kind:
        return _structure(row.annotation, a(row.kind))
    if row.choices:
        return _structure(row.annotation, f"one of {listed(row.choices)}")
    return words(row.annotation)


def a(kind: str) -> str:
    """A kind with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


_SCALARS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def words(annotation: Any) -> str:
    """What an annotation takes, in words."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if annotation is Any:
        return "a name or a nested list of names"
    if annotation is Data:
        return "any plain data"
    if annotation is Grid:
        return "a grid [T, H, W] or [H, W] of positive whole numbers"
    if get_origin(annotation) is Literal:
        return "one of " + listed(got(value).strip('"') for value in get_args(annotation))
    return _structure(annotation, "a mapping of options")


def _structure(annotation: Any, leaf: str) -> str:
    """Words for an annotation whose leaves, where they are not plain values, are `leaf`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _alternatives(args, leaf)
    if _fixed(annotation):
        kinds = {_structure(item, leaf) for item in args}
        return f"a list of {len(args)}" + (f", each {kinds.pop()}" if len(kinds) == 1 else "")
    if origin is not None and origin is not Literal:
        item = args[1] if issubclass(origin, Mapping) else args[0]
        shape = "a mapping of names to values" if issubclass(origin, Mapping) else "a list"
        return f"{shape}, each {_structure(item, leaf)}"
    if annotation in _SCALARS or annotation in (Grid, Data) or origin is Literal:
        return words(annotation)
    return leaf


def _fixed(annotation: Any) -> bool:
    """Is this a tuple of a fixed length?"""
    return get_origin(annotation) is tuple and get_args(annotation)[1:] != (Ellipsis,)


def _alternatives(members: tuple[Any, ...], leaf: str) -> str:
    found: list[str] = []
    lists: dict[str, list[int]] = {}
    for member in members:
        kinds = {_structure(item, leaf) for item in get_args(member)} if _fixed(member) else set()
        if len(kinds) == 1:
            lists.setdefault(kinds.pop(), []).append(len(get_args(member)))
        else:
            found.append(_structure(member, leaf))
    for item, sizes in lists.items():
        found.append(f"a list of {' or '.join(map(str, sizes))}" + ("" if item in found else f", each {item}"))
    return " or ".join(dict.fromkeys(found))
