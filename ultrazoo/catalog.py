"""What there is to use: registered parts, recipes, and everything that can be said about one name.

Listing imports no part; `describe` imports the one it is asked about.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import registry
from .errors import RegistryError, listed, near
from .registry import Entry
from .spec import AttentionSpec, BackboneSpec, Traits


def list_entries(kind: str | None = None) -> list[Entry]:
    """Every registered part (of one kind): built-in, registered here, installed. Raises RegistryError for another kind."""
    return registry.entries(kind)


@dataclass(frozen=True)
class OptionRow:
    """One option of a part: what it takes, its default as recipe data (None with `required`), what it means, and the `bounds`
    (ge, gt, le, lt) of every number in it."""

    name: str
    takes: str
    default: Any
    required: bool
    doc: str
    bounds: Mapping[str, float]


@dataclass(frozen=True)
class Description:
    """Everything known about one part. `start`, `limits` and `export` are empty where they do not apply; `others` are kinds
    that have a part of this name, too."""

    kind: str
    name: str
    summary: str
    about: str
    formula: str
    source: str
    origin: str
    aliases: tuple[str, ...]
    start: str
    options: tuple[OptionRow, ...]
    limits: tuple[str, ...]
    export: tuple[str, ...]
    presets: tuple[str, ...]
    recipe: Mapping[str, Any] | None
    others: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """The description as plain data."""
        return dataclasses.asdict(self)


def describe(name: str, kind: str | None = None) -> Description:
    """Everything known about the part called `name` (an alias will do); imports it.

    A name of several kinds is that of the attention. Raises RegistryError when no kind has the name, or when several do,
    none of them attention, and `kind` does not choose.
    """
    row, others = _locate(name, kind)
    cls = registry.find(row.kind, row.name)
    spec = _example(cls)
    traits = spec.traits() if isinstance(spec, AttentionSpec) else None
    return Description(
        kind=row.kind,
        name=row.name,
        summary=row.summary,
        about=inspect.cleandoc(cls.__doc__ or ""),
        formula=getattr(cls, "formula", ""),
        source=cls.source,
        origin="built-in" if row.builtin else f"{row.distribution} {row.version}".rstrip(),
        aliases=row.aliases,
        start=str(traits.start) if traits else "",
        options=_options(cls),
        limits=_limits(traits) if traits else (),
        export=tuple(traits.export) if traits else (),
        presets=tuple(getattr(cls, "presets", ()) or ()),
        recipe=_minimal(cls),
        others=others,
    )


def _locate(name: str, kind: str | None) -> tuple[Entry, tuple[str, ...]]:
    """The part, and the other kinds that have one of this name; an attention comes before parts of attentions."""
    found = []
    for each in registry.KINDS:
        known = {alias.casefold() for row in registry.entries(each) for alias in (row.name, *row.aliases)}
        if name.casefold() in known:
            found.append(each)
    # a part's own name beats an alias of another kind's
    exact = [each for each in found if any(row.name == name for row in registry.entries(each))]
    found = exact or found
    if kind is not None:
        row = registry.entry(kind, name)
        return row, tuple(each for each in found if each != kind)
    if len(found) > 1 and "attention" not in found:
        raise RegistryError(f"{name!r} is the name of several parts; choose with --kind: {listed(found)}")
    if not found:
        everything = sorted({alias for row in registry.entries() for alias in (row.name, *row.aliases)})
        hint = near(name, everything) or "`ultrazoo list` shows every name"
        raise RegistryError(f"nothing is called {name!r}; {hint}")
    first = "attention" if "attention" in found else found[0]
    return registry.entry(first, name), tuple(each for each in found if each != first)


def _options(cls: Any) -> tuple[OptionRow, ...]:
    from .options import declared, expected, to_data

    return tuple(
        OptionRow(
            name=row.name,
            takes=expected(row),
            default=None if row.required else to_data(row.default),
            required=row.required,
            doc=row.doc,
            bounds=dict(row.bounds),
        )
        for row in declared(cls)
    )


def _example(cls: Any) -> Any:
    """The part as the smallest recipe writes it; None for a part of a plugin that cannot be written so."""
    from .options import parse

    return parse(cls, cls.minimal)[0]


def _limits(traits: Traits) -> tuple[str, ...]:
    rows = []
    if traits.needs:
        rows.append(f"needs {listed(sorted(traits.needs))}")
    if not traits.extra:
        rows.append("takes no extra tokens (joint text, registers)")
    if not traits.key_valid:
        rows.append("takes no padded grid tokens")
    rows.append(f"exports with dynamic sizes from grid {traits.min_grid}" if traits.export else "does not export")
    if traits.visible != "exact":
        rows.append("what a query may depend on is known as an upper bound")
    if traits.exact_at_init:
        rows.append("a fresh block equals full attention with the host's weights")
    if traits.notes:
        rows.append(traits.notes)
    return tuple(rows)


_OF_BLOCK_SPARSE = {"selector": "selector", "far_field": "far"}
"""Kinds that stand in an option of block-sparse attention, by its name."""


def _minimal(cls: Any) -> dict[str, Any] | None:
    """The smallest recipe that uses the part; None where a recipe does not name parts of its kind."""
    part = {"name": cls.name, **cls.minimal}
    if cls.kind == "backbone":
        preset = next(iter(cls.presets), None)
        found = _recipe(cls.name, backbone={"name": cls.name, "preset": preset} if preset else part)
        return {**found, "video": dict(cls.minimal_video)}
    if cls.kind == "attention":
        return _recipe(cls.name, attention=part)
    if cls.kind == "kernel":
        if "name" in cls.beside:
            # an attention of its own runs it, and has no other kernel
            return _recipe(cls.name, attention=dict(cls.beside))
        around = {"name": "block_sparse" if "block_map" in cls.needs else "full", **cls.beside}
        return _recipe(cls.name, attention={**around, "kernel": cls.name})
    if cls.kind in _OF_BLOCK_SPARSE:
        around = {"name": "block_sparse", **cls.beside, _OF_BLOCK_SPARSE[cls.kind]: part}
        return _recipe(cls.name, attention=around)
    attention = _branched(cls, part)
    return _recipe(cls.name, attention=attention) if attention else None


def _recipe(name: str, *, attention: Any = None, backbone: Any = None) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": f"my_{name.replace('/', '_').replace('-', '_')}",
        "video": dict(BackboneSpec.minimal_video),
        "backbone": backbone or {"name": "wan", "preset": "t2v_1_3b"},
        "attention": {"*": attention or {"name": "full"}},
    }


def _branched(cls: Any, part: dict[str, Any]) -> dict[str, Any] | None:
    """A two-branch attention, ``local`` and ``overview``, in which `part` stands where parts of its kind do."""
    kind = cls.kind
    local: dict[str, Any] = {"layout": {"name": "windows", "counts": [4, 4]}}
    overview: dict[str, Any] = {"compress": {"name": "avg_pool", "factor": 4}}
    whole: dict[str, Any] = {"name": "branched", "branches": {"local": local, "overview": overview}}
    if kind in ("layout", "shift"):
        local[kind] = part
    elif kind == "compress":
        overview[kind] = part
    elif kind == "fuse":
        whole[kind] = part
        if cls.wants_lse:
            # one softmax over all keys is one softmax of the same queries
            overview["compress"]["of"] = "keys"
    else:
        return None
    return whole
