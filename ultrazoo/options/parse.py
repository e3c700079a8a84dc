"""From plain data to typed specs, by the annotations of the class and the metadata of `spec.option`.

Nothing here raises for bad data: every function returns the value, or None and all problems found, with dotted paths.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from .. import registry
from ..errors import Problem, RegistryError, listed, near
from ..grid import Grid, as_grid
from ..spec import Data, Options, Spec
from .data import FrozenMap, frozen
from .declared import Declared, a, declared, expected, got, words

Parsed = tuple[Any, list[Problem]]

_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("more than", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


def parse(cls: type, data: Any, path: str = "", label: str = "") -> Parsed:
    """An instance of the spec or options class `cls` from a mapping of options.

    Returns ``(instance, [])`` or ``(None, problems)``. `label` names the thing in messages.
    """
    if isinstance(data, cls):
        return data, []
    label = label or _label(cls, path)
    if not isinstance(data, Mapping):
        return None, [Problem(path, f"expected a mapping with the options of {label}, got {got(data)}")]
    fields = {row.name: row for row in declared(cls)}
    named = bool(getattr(cls, "name", ""))
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = join(path, key)
        if key == "name" and named and "name" not in fields:
            continue
        if not isinstance(key, str) or key not in fields:
            hint = near(str(key), fields) or (f"options are {listed(fields)}" if fields else "it has no options")
            problems.append(Problem(where, f"unknown option of {label}", hint))
            continue
        values[key], found = _option(fields[key], value, where)
        problems += found
    for row in fields.values():
        if row.required and row.name not in data:
            fix = f"give {expected(row)}" + (f": {row.doc}" if row.doc else "")
            problems.append(Problem(join(path, row.name), f"{label} needs the option {row.name!r}", fix))
    if problems:
        return None, problems
    try:
        return cls(**values), []
    except (TypeError, ValueError) as error:
        # what one option alone cannot show: a class may refuse a combination in __post_init__
        return None, [Problem(path, str(error))]


def parse_part(kind: str, data: Any, path: str = "") -> Parsed:
    """A registered part of `kind` from a mapping with ``name``, or from the bare name.

    Returns ``(spec, [])`` or ``(None, problems)``. A ``preset`` of a backbone is spread under the options given.
    """
    if isinstance(data, Spec):
        if data.kind == kind:
            return data, []
        return None, [Problem(path, f"expected {a(kind)}, got the {data.kind} {data.name!r}")]
    where = join(path, "name") if isinstance(data, Mapping) else path
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping):
        return None, [Problem(path, f"expected {a(kind)}, a name or a mapping with 'name', got {got(data)}")]
    if "name" not in data:
        return None, [Problem(path, f"this {kind} has no 'name'", f"names are {listed(registry.names(kind))}")]
    name = data["name"]
    if not isinstance(name, str):
        rule = f"expected the name of {a(kind)}, got {got(name)}"
        return None, [Problem(where, rule, f"names are {listed(registry.names(kind))}")]
    try:
        cls = registry.find(kind, name)
    except RegistryError as error:
        return None, [Problem(where, str(error))]
    if getattr(cls, "presets", None) and "preset" in data:
        preset, problems = preset_fields(cls, data["preset"], join(path, "preset"))
        if problems:
            return None, problems
        if data["preset"] is None:
            data = {key: value for key, value in data.items() if key != "preset"}
        keep = {"preset"} if any(row.name == "preset" for row in declared(cls)) else set()
        data = {**preset, **{key: value for key, value in data.items() if key != "preset" or key in keep}}
    return parse(cls, data, path)


def preset_fields(cls: Any, preset: Any, path: str) -> tuple[dict[str, Any], list[Problem]]:
    """The options that a backbone's preset stands for, or a problem that says whose preset it is; None stands for none, so
    that a recipe can undo what it extends."""
    table: Mapping[str, Mapping[str, Any]] = cls.presets
    if preset is None:
        return {}, []
    if isinstance(preset, str) and preset in table:
        return dict(table[preset]), []
    known = f"presets of {cls.name!r} are {listed(table)}"
    if not isinstance(preset, str):
        return {}, [Problem(path, f"expected the name of a preset, got {got(preset)}", known)]
    for entry in registry.entries(cls.kind):
        if entry.builtin and entry.name != cls.name:
            other = registry.find(cls.kind, entry.name)
            if preset in other.presets:
                rule = f"{preset!r} is a preset of {cls.kind} {entry.name!r}, not of {cls.name!r}"
                return {}, [Problem(path, rule, known)]
    return {}, [Problem(path, f"unknown preset {preset!r} of {cls.kind} {cls.name!r}", near(preset, table) or known)]


def join(path: str, key: Any) -> str:
    """The dotted path of a child."""
    return f"{path}.{key}" if path else str(key)


def _label(cls: type, path: str) -> str:
    name = getattr(cls, "name", "")
    if name and issubclass(cls, Spec):
        return f"{cls.kind} {name!r}"
    field = path.rpartition(".")[2]
    if name:
        return f"{field} {name!r}" if field else repr(name)
    return repr(field) if field else cls.__name__


def _option(row: Declared, data: Any, path: str) -> Parsed:
    value, problems = _value(row.annotation, row, data, path)
    if problems:
        return None, problems
    if isinstance(value, FrozenMap):
        entries = [(join(path, key), one, data[key]) for key, one in value.items()]
    else:
        entries = [(path, value, data)]
    for where, one, written in entries:
        for number in _numbers(one):
            for key, bound in row.bounds:
                rule, holds = _BOUNDS[key]
                if not holds(number, bound):
                    problems.append(Problem(where, f"must be {rule} {bound}, got {got(written)}"))
    return (None, list(dict.fromkeys(problems))) if problems else (value, [])


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)


def _value(annotation: Any, row: Declared, data: Any, path: str) -> Parsed:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _union(get_args(annotation), row, data, path)
    if origin is Literal:
        return _literal(annotation, data, path)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(get_args(annotation)[1], row, data, path)
    if origin is not None and issubclass(origin, Sequence):
        return _sequence(annotation, row, data, path)
    if annotation is type(None):
        return (None, []) if data is None else (None, [_wrong(annotation, data, path)])
    if row.kind:
        return _name(row, data, path) if annotation is str else parse_part(row.kind, data, path)
    if row.choices:
        return _choice(row.choices, data, path)
    if annotation is Any:
        return _tree(data, path)
    if annotation is Data:
        return frozen(data), []
    if isinstance(annotation, type) and issubclass(annotation, (Options, Spec)):
        return parse(annotation, data, path)
    return _scalar(annotation, data, path)


def _scalar(annotation: Any, data: Any, path: str) -> Parsed:
    if annotation is Grid:
        try:
            return as_grid(tuple(data)), []
        except (TypeError, ValueError):
            return None, [_wrong(annotation, data, path)]
    if annotation is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        try:
            number = float(data)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            return None, [Problem(path, f"expected a finite number, got {got(data)}")]
        return number, []
    if annotation in (int, str, bool) and type(data) is annotation:
        return data, []
    if annotation not in (int, float, str, bool, Grid):
        raise TypeError(f"{path}: options cannot be annotated {annotation!r}")
    return None, [_wrong(annotation, data, path)]


def _union(members: tuple[Any, ...], row: Declared, data: Any, path: str) -> Parsed:
    if data is None:
        return (None, []) if type(None) in members else (None, [_wrong_one_of(members, row, data, path)])
    members = tuple(member for member in members if member is not type(None))
    tried = [_value(member, row, data, path) for member in members]
    for value, problems in tried:
        if not problems:
            return value, []
    structured = isinstance(data, Mapping)
    fitting = [problems for member, (_, problems) in zip(members, tried, strict=True) if _takes_mapping(member)]
    if structured and fitting:
        return None, fitting[0]
    if len(members) == 1:
        return None, tried[0][1]
    return None, [_wrong_one_of(members, row, data, path)]


def _takes_mapping(member: Any) -> bool:
    origin = get_origin(member) or member
    return isinstance(origin, type) and issubclass(origin, (Mapping, Options, Spec))


def _wrong_one_of(members: tuple[Any, ...], row: Declared, data: Any, path: str) -> Problem:
    # the members are a runtime tuple, which the | syntax cannot spell
    union: Any = Union.__getitem__(members)
    return Problem(path, f"expected {expected(dataclasses.replace(row, annotation=union))}, got {got(data)}")


def _literal(annotation: Any, data: Any, path: str) -> Parsed:
    allowed = get_args(annotation)
    for value in allowed:
        if type(value) is type(data) and value == data:
            return value, []
    problem = _wrong(annotation, data, path)
    if isinstance(data, str):
        problem = dataclasses.replace(problem, fix=near(data, [v for v in allowed if isinstance(v, str)]))
    return None, [problem]


def _sequence(annotation: Any, row: Declared, data: Any, path: str) -> Parsed:
    if isinstance(data, (str, bytes)) or not isinstance(data, Sequence):
        return None, [_wrong(annotation, data, path)]
    args = get_args(annotation)
    if get_origin(annotation) is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(data) != len(args):
            return None, [_wrong(annotation, data, path)]
        items: Sequence[Any] = args
    else:
        items = [args[0]] * len(data)
    values, problems = [], []
    for index, (item, value) in enumerate(zip(items, data, strict=True)):
        parsed, found = _value(item, row, value, join(path, index))
        values.append(parsed)
        problems += found
    return (None, problems) if problems else (tuple(values), [])


def _mapping(item: Any, row: Declared, data: Any, path: str) -> Parsed:
    if not isinstance(data, Mapping):
        return None, [Problem(path, f"expected {expected(row)}, got {got(data)}")]
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in data.items():
        if not isinstance(key, str):
            problems.append(Problem(join(path, key), f"names are text, got {got(key)}"))
            continue
        values[key], found = _value(item, row, value, join(path, key))
        problems += found
    return (None, problems) if problems else (FrozenMap(values), [])


def _name(row: Declared, data: Any, path: str) -> Parsed:
    """An option annotated ``str`` with a kind: the name of a part, kept as text; its default is a legal name too."""
    if not isinstance(data, str):
        return None, [Problem(path, f"expected the name of {a(str(row.kind))}, got {got(data)}")]
    if data == row.default:
        return data, []
    try:
        return registry.entry(str(row.kind), data).name, []
    except RegistryError as error:
        return None, [Problem(path, str(error))]


def _choice(choices: Mapping[str, type], data: Any, path: str) -> Parsed:
    for cls in choices.values():
        if isinstance(data, cls):
            return data, []
    where = join(path, "name") if isinstance(data, Mapping) else path
    if isinstance(data, str):
        data = {"name": data}
    field = path.rpartition(".")[2]
    if not isinstance(data, Mapping):
        return None, [Problem(path, f"expected one of {listed(choices)}, or a mapping with 'name', got {got(data)}")]
    if "name" not in data:
        return None, [Problem(path, f"{field!r} has no 'name'", f"names are {listed(choices)}")]
    name = data["name"]
    if not isinstance(name, str) or name not in choices:
        hint = near(name, choices) if isinstance(name, str) else ""
        return None, [Problem(where, f"unknown {field} {got(name)}", hint or f"names are {listed(choices)}")]
    return parse(choices[name], data, path, label=f"{field} {name!r}")


def _tree(data: Any, path: str) -> Parsed:
    if isinstance(data, str):
        return data, []
    if isinstance(data, Sequence) and not isinstance(data, bytes) and len(data) > 0:
        values, problems = [], []
        for index, item in enumerate(data):
            value, found = _tree(item, join(path, index))
            values.append(value)
            problems += found
        return (None, problems) if problems else (tuple(values), [])
    return None, [Problem(path, f"expected a name or a nested list of names, got {got(data)}")]


def _wrong(annotation: Any, data: Any, path: str) -> Problem:
    return Problem(path, f"expected {words(annotation)}, got {got(data)}")
