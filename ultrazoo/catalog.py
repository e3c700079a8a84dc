"""What there is to use: registered parts, recipes, and everything that can be said about one name.

Listing imports no part. `describe` imports the one it is asked about, and the built-in ones, whose options may have choices
of that name.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
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
    """One option of a part: what it takes, its default as recipe data (None with `required`), what it means, the `bounds`
    (ge, gt, le, lt) of every number in it, and the `groups` of options that may stand in it."""

    name: str
    takes: str
    default: Any
    required: bool
    doc: str
    bounds: Mapping[str, float]
    groups: tuple[OptionGroup, ...] = ()


@dataclass(frozen=True)
class OptionGroup:
    """Options inside an option: those of the choice `name`, which is empty where there is only one form; `summary` is a
    sentence, `about` the whole of it."""

    name: str
    summary: str
    about: str
    options: tuple[OptionRow, ...]


@dataclass(frozen=True)
class KernelFacts:
    """What a kernel states of itself. `takes` beside q, k and v, `needs` of those; `head_dims` are the smallest and the largest
    head size, all of them multiples of `head_step`; one that is not `exact` runs only by name."""

    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, int]
    head_step: int
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    exact: bool
    backward: bool
    exportable: bool


@dataclass(frozen=True)
class Description:
    """Everything known about one part, or about one choice of an option: its `kind` is the option's name then, and `of` says
    which options it may stand in. `start`, `limits` and `export` are empty and `kernel` is None where they do not apply;
    `others` are kinds that have a part or a choice of this name, too."""

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
    of: tuple[str, ...] = ()
    kernel: KernelFacts | None = None

    def data(self) -> dict[str, Any]:
        """The description as plain data."""
        return dataclasses.asdict(self)


def describe(name: str, kind: str | None = None) -> Description:
    """Everything known about the part called `name` (an alias will do), or about the choice of an option of that name.

    A name of several kinds is that of the attention, and a part's before a choice's; the kind of a choice is the name of its
    option. Raises RegistryError when nothing has the name, or when several have it, none of them first, and `kind` does not
    choose.
    """
    row, others = _locate(name, kind)
    if isinstance(row, _Choice):
        return _describe_choice(row, others)
    cls = registry.find(row.kind, row.name)
    spec = _example(cls)
    traits = spec.traits() if isinstance(spec, AttentionSpec) else None
    return Description(
        kind=row.kind,
        name=row.name,
        summary=row.summary or _sentence(_about(cls)).rstrip("."),
        about=_about(cls),
        formula=getattr(cls, "formula", ""),
        source=cls.source,
        origin=_origin(row),
        aliases=row.aliases,
        start=str(traits.start) if traits else "",
        options=option_rows(cls),
        limits=_limits(traits) if traits else (),
        export=tuple(traits.export) if traits else (),
        presets=tuple(getattr(cls, "presets", ()) or ()),
        recipe=_minimal(cls),
        others=others,
        kernel=kernel_facts(cls) if row.kind == "kernel" else None,
    )


def _describe_choice(row: _Choice, others: tuple[str, ...]) -> Description:
    about = _about(row.cls)
    return Description(
        kind=row.kind,
        name=row.name,
        summary=_sentence(about).rstrip("."),
        about=about,
        formula="",
        source=getattr(row.cls, "source", ""),
        origin=row.origin,
        aliases=(),
        start="",
        options=option_rows(row.cls),
        limits=(),
        export=(),
        presets=(),
        recipe=None,
        others=others,
        of=row.of,
    )


def _about(cls: type) -> str:
    """The docstring of a class; empty where it is the signature that dataclasses put in its place."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph, maxsplit=1)[0]


def _origin(row: Entry) -> str:
    return "built-in" if row.builtin else f"{row.distribution} {row.version}".rstrip()


@dataclass(frozen=True)
class _Choice:
    """A class of options with a name, in an option called `kind`; `of` are the options that it may stand in."""

    kind: str
    name: str
    cls: type
    origin: str
    of: tuple[str, ...]


def _choices() -> list[_Choice]:
    """Every choice of an option of a part that ships or is registered here; an installed plugin is not imported for it."""
    found: dict[tuple[str, str, type], _Choice] = {}
    for row in registry.entries():
        if not row.builtin and row.status != "local":
            continue
        part = registry.find(row.kind, row.name)
        if not dataclasses.is_dataclass(part):
            # it says so itself when it is asked for
            continue
        for path, kind, name, cls in _choices_of(part, ""):
            known = found.get((kind, name, cls))
            place = f"{path} of {row.kind} {row.name}"
            of = (*known.of, place) if known else (place,)
            found[(kind, name, cls)] = _Choice(kind, name, cls, known.origin if known else _origin(row), of)
    # an option of the same name may have a choice of the same name elsewhere: the place tells them apart
    keys = [(kind, name) for kind, name, _ in found]
    return [
        one if keys.count((one.kind, one.name)) == 1 else dataclasses.replace(one, kind=one.of[0].replace(" ", "_"))
        for one in found.values()
    ]


def _choices_of(cls: Any, under: str) -> Iterator[tuple[str, str, str, type]]:
    from .options import declared
    from .options.declared import groups, named

    for row in declared(cls):
        path = f"{under}{row.name}"
        for name, group in groups(row):
            if name:
                yield path, row.name, name, group
            yield from _choices_of(group, f"{path}.*." if named(row.annotation) else f"{path}.")


def _locate(name: str, kind: str | None) -> tuple[Entry | _Choice, tuple[str, ...]]:
    """The part or choice, and the other kinds that have one of this name; an attention comes before parts of attentions, and
    those before choices."""
    found = []
    for each in registry.KINDS:
        known = {alias.casefold() for row in registry.entries(each) for alias in (row.name, *row.aliases)}
        if name.casefold() in known:
            found.append(each)
    # a part's own name beats an alias of another kind's
    exact = [each for each in found if any(row.name == name for row in registry.entries(each))]
    found = exact or found
    everywhere = _choices()
    choices = {one.kind: one for one in everywhere if one.name == name}
    kinds = [*found, *(each for each in choices if each not in found)]
    if kind in choices and kind not in found:
        return choices[kind], tuple(each for each in kinds if each != kind)
    if kind is not None:
        names = sorted({one.name for one in everywhere if one.kind == kind})
        if names and kind not in registry.KINDS:
            raise RegistryError(f"unknown {kind} {name!r}; {near(name, names) or f'known: {listed(names)}'}")
        return registry.entry(kind, name), tuple(each for each in kinds if each != kind)
    first = ["attention"] if "attention" in found else found or kinds
    if len(first) > 1:
        raise RegistryError(f"{name!r} is the name of several parts; choose with --kind: {listed(kinds)}")
    if not first:
        everything = {alias for row in registry.entries() for alias in (row.name, *row.aliases)}
        hint = near(name, sorted(everything | {one.name for one in everywhere}))
        raise RegistryError(f"nothing is called {name!r}; {hint or '`ultrazoo list` shows every name'}")
    row = registry.entry(first[0], name) if found else choices[first[0]]
    return row, tuple(each for each in kinds if each != first[0])


def option_rows(cls: Any) -> tuple[OptionRow, ...]:
    """The options of a spec or options class, with those inside them."""
    from .options import declared, expected, to_data
    from .options.declared import groups

    return tuple(
        OptionRow(
            name=row.name,
            takes=expected(row),
            default=None if row.required else to_data(row.default),
            required=row.required,
            doc=row.doc,
            bounds=dict(row.bounds),
            groups=tuple(
                OptionGroup(name, _sentence(_about(group)), _about(group), option_rows(group))
                for name, group in groups(row)
            ),
        )
        for row in declared(cls)
    )


def kernel_facts(cls: Any) -> KernelFacts:
    """What the class of a kernel states."""
    return KernelFacts(
        devices=tuple(cls.devices),
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in cls.dtypes),
        head_dims=tuple(cls.head_dims),
        head_step=cls.head_step,
        takes=tuple(sorted(cls.takes)),
        needs=tuple(sorted(cls.needs)),
        exact=cls.exact,
        backward=cls.backward,
        exportable=cls.exportable,
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
        found = _recipe(cls.name, attention=around)
        # a part that names sampling steps asks how many there are
        counted = getattr(_example(cls), "counts_steps", False)
        return {**found, "sampling": {"steps": 30}} if counted else found
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
