"""The JSON Schema of recipes, made from the registry: every built-in part with its options, plugins by their name alone.

A validator with this schema accepts every recipe that `check` accepts, and refuses unknown keys, names, types and bounds;
what depends on the size or on other nodes is for `check`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from .. import registry
from ..grid import Grid
from ..options import Declared, declared, to_data
from ..registry import Entry
from ..spec import Data, Options, Spec, Video
from .resolved import SCHEMA, Head, Sampling, WeightsSource

_LAYER_ITEM = r"([^,:]+:)?(\*|odd|even|(first|last)[0-9]+|[0-9]+(-[0-9]+(/[0-9]+)?)?)"
LAYER_KEYS = rf"^\s*{_LAYER_ITEM}\s*(,\s*{_LAYER_ITEM}\s*)*$"

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_REFERENCE = {"type": "string", "pattern": r"\$\{"}
_TREE = {"$ref": "#/$defs/tree"}

Json = dict[str, Any]


def json_schema() -> Json:
    """A JSON Schema (draft 2020-12) of recipes. Imports every built-in part."""
    writer = _Writer()
    head = {row.name: writer.option(row, cycle=False) for row in declared(Head)}
    head["schema"] = {"const": SCHEMA}
    attention = writer.part("attention")
    layers: Json = {"type": "object", "propertyNames": {"pattern": LAYER_KEYS}}
    strict: Json = {
        "required": ["video", "backbone", "attention"],
        "properties": {
            "video": writer.group(Video),
            "sampling": _or_null(writer.group(Sampling)),
            "backbone": writer.part("backbone", cycle=False),
            "attention": {**layers, "minProperties": 1, "additionalProperties": attention},
            "steps": _or_null({**layers, "additionalProperties": {**layers, "additionalProperties": attention}}),
            "weights": _or_null(writer.group(WeightsSource)),
        },
    }
    # what a recipe lays over others need not be whole: null deletes, a node may leave its name to the base
    partial: Json = {"properties": {key: {"type": ["object", "string", "null"]} for key in strict["properties"]}}
    names = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ultrazoo recipe",
        "type": "object",
        "properties": {
            **head,
            "extends": {"anyOf": [{"type": "string"}, names], "description": "recipes that this one is laid over"},
            **dict.fromkeys(strict["properties"], True),
            "search": _or_null(_search()),
        },
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "then": partial,
        "else": strict,
        "$defs": {**writer.defs, "tree": _tree()},
    }


def _search() -> Json:
    def form(name: str, **items: Any) -> Json:
        return {
            "type": "object",
            "properties": {name: {"type": "array", "minItems": 1, **items}},
            "required": [name],
            "additionalProperties": False,
        }

    numbers = {"items": {"type": "number"}, "minItems": 2, "maxItems": 3}
    domain = {"anyOf": [form("choice"), form("range", **numbers), form("log_range", **numbers)]}
    return {
        "type": "object",
        "properties": {"space": {"type": "object", "additionalProperties": domain}},
        "required": ["space"],
        "additionalProperties": False,
    }


def _tree() -> Json:
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": _TREE, "minItems": 1}]}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


class _Writer:
    """Turns declared options into schemas; parts and groups become named definitions."""

    def __init__(self) -> None:
        self.defs: Json = {}

    def part(self, kind: str, *, cycle: bool = True) -> Json:
        """A reference to the schema of any part of `kind`."""
        if kind not in self.defs:
            self.defs[kind] = {}
            rows = registry.entries(kind)
            forms = [self.named(row, cycle=cycle) for row in rows if row.status in ("built-in", "local")]
            known = [row.name for row in rows if row.status in ("built-in", "local")]
            foreign = {"type": "string", "pattern": "^[^/]+/.+$", "not": {"enum": known}}
            forms += [foreign, {"type": "object", "properties": {"name": foreign}, "required": ["name"]}]
            self.defs[kind] = {"anyOf": forms}
        return self.cycled({"$ref": f"#/$defs/{kind}"}) if cycle else {"$ref": f"#/$defs/{kind}"}

    def named(self, row: Entry, *, cycle: bool) -> Json:
        """The forms in which one registered part is written: its bare name, or a mapping."""
        cls = registry.find(row.kind, row.name)
        names = list(dict.fromkeys([row.name, *row.aliases]))
        schema: Json = self.options(cls, cycle=cycle)
        schema["properties"] = {"name": {"enum": names}, **schema["properties"]}
        presets = getattr(cls, "presets", None)
        if presets:
            schema["properties"]["preset"] = {"enum": list(presets), "description": "a set of options by name"}
            # a preset may give what is required
            schema["required"] = []
        needed = schema["required"]
        schema["required"] = ["name", *needed]
        schema["description"] = row.summary
        key = f"{row.kind}.{row.name}"
        self.defs[key] = schema
        reference = {"$ref": f"#/$defs/{key.replace('~', '~0').replace('/', '~1')}"}
        return reference if needed else {"anyOf": [{"enum": names}, reference]}

    def group(self, cls: type) -> Json:
        """A reference to the schema of an options group outside `attention`."""
        self.defs.setdefault(cls.__name__, self.options(cls, cycle=False))
        return {"$ref": f"#/$defs/{cls.__name__}"}

    def options(self, cls: type, *, cycle: bool) -> Json:
        """The options of a class as a closed object."""
        rows = declared(cls)
        schema: Json = {
            "type": "object",
            "properties": {row.name: self.option(row, cycle=cycle) for row in rows},
            "required": [row.name for row in rows if row.required],
            "additionalProperties": False,
        }
        return schema

    def option(self, row: Declared, *, cycle: bool) -> Json:
        """One option: its values, a reference into the recipe, and for attentions a cycle of values."""
        value = self.value(row.annotation, row, cycle)
        schema: Json = self.cycled(value) if cycle else {"anyOf": [value, _REFERENCE]}
        if row.doc:
            schema["description"] = row.doc
        if not row.required:
            schema["default"] = to_data(row.default)
        return schema

    def cycled(self, value: Json) -> Json:
        cycle = {
            "type": "object",
            "properties": {"cycle": {"type": "array", "minItems": 1, "items": value}},
            "required": ["cycle"],
            "additionalProperties": False,
        }
        return {"anyOf": [value, cycle, _REFERENCE]}

    def value(self, annotation: Any, row: Declared, cycle: bool) -> Json:
        origin, args = get_origin(annotation), get_args(annotation)
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.value(member, row, cycle) for member in args]}
        if origin is Literal:
            return {"enum": list(args)}
        if origin is not None and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.nested(args[1], row, cycle)}
        if origin is not None and issubclass(origin, Sequence):
            return self.sequence(origin, args, row, cycle)
        if annotation is type(None):
            return {"type": "null"}
        if annotation is Data:
            return {}
        if row.kind:
            # an option annotated `str` names a part and configures nothing
            return {"type": "string"} if annotation is str else self.part(row.kind, cycle=cycle)
        if row.choices:
            return {"anyOf": [form for name, cls in row.choices.items() for form in self.choice(name, cls, cycle)]}
        if isinstance(annotation, type) and issubclass(annotation, (Options, Spec)):
            return self.options(annotation, cycle=cycle)
        return self.scalar(annotation, row)

    def nested(self, annotation: Any, row: Declared, cycle: bool) -> Json:
        value = self.value(annotation, row, cycle)
        return self.cycled(value) if cycle else {"anyOf": [value, _REFERENCE]}

    def choice(self, name: str, cls: type, cycle: bool) -> list[Json]:
        schema = self.options(cls, cycle=cycle)
        schema["properties"] = {"name": {"const": name}, **schema["properties"]}
        needed = schema["required"]
        schema["required"] = ["name", *needed]
        return [schema] if needed else [{"const": name}, schema]

    def sequence(self, origin: type, args: tuple[Any, ...], row: Declared, cycle: bool) -> Json:
        if origin is tuple and args[1:] != (Ellipsis,):
            items = [self.nested(item, row, cycle) for item in args]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": self.nested(args[0], row, cycle)}

    @staticmethod
    def scalar(annotation: Any, row: Declared) -> Json:
        bounds = {_BOUNDS[key]: value for key, value in row.bounds}
        if annotation is Any:
            return dict(_TREE)
        if annotation is Grid:
            return {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 3}
        if annotation is bool:
            return {"type": "boolean"}
        if annotation is str:
            return {"type": "string"}
        if annotation in (int, float):
            return {"type": "integer" if annotation is int else "number", **bounds}
        raise TypeError(f"options cannot be annotated {annotation!r}")
