"""What a spec or options class declares, and the words that error messages and `describe` use for it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from ..errors import listed
from ..grid import Grid
from ..spec import Data, Options

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
        return _structure(row.annotation, _Leaf(a(row.kind), f"{row.kind}s"))
    if row.choices:
        return _structure(row.annotation, _Leaf(f"one of {listed(row.choices)}"))
    return words(row.annotation)


def a(kind: str) -> str:
    """A kind with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


class _Leaf(NamedTuple):
    """Words for one value that is no list and no mapping of names, and for several; `many` is empty where there are none."""

    one: str
    many: str = ""


_SCALARS: Mapping[Any, _Leaf] = {
    int: _Leaf("a whole number", "whole numbers"),
    float: _Leaf("a number", "numbers"),
    str: _Leaf("text", "texts"),
    bool: _Leaf("true or false"),
    type(None): _Leaf("null"),
    Any: _Leaf("a name or a nested list of names"),
    Data: _Leaf("any plain data"),
    Grid: _Leaf("a grid [T, H, W] or [H, W] of positive whole numbers"),
}
_OPTIONS = _Leaf("a mapping of options", "mappings of options")


def words(annotation: Any) -> str:
    """What an annotation takes, in words."""
    return _structure(annotation, _OPTIONS)


def groups(row: Declared) -> tuple[tuple[str, type], ...]:
    """The classes of options that may stand in an option without a kind: each choice by its name, or "" and the only one."""
    if row.kind:
        return ()
    if row.choices:
        return tuple(row.choices.items())
    return tuple(("", cls) for cls in dict.fromkeys(_classes(row.annotation)))


def _classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and issubclass(annotation, Options):
        yield annotation
    for part in get_args(annotation):
        yield from _classes(part)


def named(annotation: Any) -> bool:
    """Does an annotation take a mapping of names to values?"""
    return _maps(annotation) or (_is_union(annotation) and any(map(named, get_args(annotation))))


def _structure(annotation: Any, leaf: _Leaf) -> str:
    """Words for an annotation whose leaves, where they are not plain values, are `leaf`."""
    if _is_union(annotation):
        return _alternatives(get_args(annotation), leaf)
    if get_origin(annotation) is Literal:
        values = [got(value).strip('"') for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {listed(values)}"
    if annotation in _SCALARS:
        return _SCALARS[annotation].one
    if get_origin(annotation) is None:
        return leaf.one
    return _container(annotation) + _items(annotation, leaf)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _maps(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _holds(annotation: Any) -> bool:
    """Is this a list or a mapping of names?"""
    return get_origin(annotation) not in (None, Literal) and not _is_union(annotation)


def _fixed(annotation: Any) -> bool:
    """Is this a tuple of a fixed length?"""
    return get_origin(annotation) is tuple and get_args(annotation)[1:] != (Ellipsis,)


def _container(annotation: Any) -> str:
    """A list or mapping without its items."""
    if _maps(annotation):
        return "a mapping of names"
    return f"a list of {len(get_args(annotation))}" if _fixed(annotation) else "a list"


def _items(annotation: Any, leaf: _Leaf) -> str:
    """The items of a list or mapping, in words that follow it; empty where a list of fixed length holds several kinds."""
    args = get_args(annotation)
    if _fixed(annotation) and len(set(args)) > 1:
        return ""
    item = args[1] if _maps(annotation) else args[0]
    of = " " if _fixed(annotation) else " to " if _maps(annotation) else " of "
    many = "" if _holds(item) or _is_union(item) or get_origin(item) is Literal else _SCALARS.get(item, leaf).many
    if many:
        return of + many
    values = " to values" if _maps(annotation) else ""
    return f"{values} (each {_structure(item, leaf)})"


def _alternatives(members: tuple[Any, ...], leaf: _Leaf) -> str:
    """Members of a union: plain values, then lists and mappings, null last."""
    plain = [member for member in members if not _holds(member) and member is not type(None)]
    held = [member for member in members if _holds(member)]
    sizes: dict[str, list[int]] = {}
    for member in filter(_fixed, held):
        sizes.setdefault(_items(member, leaf), []).append(len(get_args(member)))
    found = [_structure(member, leaf) for member in plain]
    found += [f"a list of {' or '.join(map(str, counts))}{items}" for items, counts in sizes.items()]
    found += [_container(one) + (_again(one, plain, held) or _items(one, leaf)) for one in held if not _fixed(one)]
    found += ["null"] if type(None) in members else []
    *before, last = dict.fromkeys(found)
    if not before:
        return last
    # "or" without a comma would go on about the items of a list
    comma = any(one.startswith(("a list", "a mapping of names")) for one in before)
    return ", ".join(before) + (", or " if comma else " or ") + last


def _again(annotation: Any, plain: list[Any], held: list[Any]) -> str:
    """The items of a list or mapping where they are what stands beside it in a union; empty where they are not."""
    item = get_args(annotation)[1 if _maps(annotation) else 0]
    of = " to " if _maps(annotation) else " of "
    if _holds(item) and item in held:
        return f"{of}such {'mappings' if _maps(item) else 'lists'}"
    if _is_union(item) and set(get_args(item)) <= set(plain):
        return f"{of}these"
    return ""
