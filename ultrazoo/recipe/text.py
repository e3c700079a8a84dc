"""YAML in and out: a small safe loader with the scalars of YAML 1.2, and a writer that it reads back unchanged.

Built on PyYAML's event stream, so no constructor is ever involved: tags are refused, ``no`` and ``012`` are text, keys
are text, a key given twice is an error, and every entry keeps its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from ..errors import Problem, RecipeError
from .tree import DEEPEST, LARGEST, Map, Mark, Seq

LARGEST_FILE = 1 << 20
"""Most bytes in one recipe file."""

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# YAML 1.2 reads 012 as 12; here it is text, so that nobody's octal becomes a number in silence
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
_BASED = re.compile(r"0x[0-9a-fA-F]{1,32}|0o[0-7]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?(0|[1-9][0-9]*)[eE][-+]?[0-9]+")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def scalar(text: str) -> Any:
    """What unquoted text means: null, a boolean, a number, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    if text in (".nan", ".NaN", ".NAN"):
        return math.nan
    return text


def read(text: str, source: str) -> Any:
    """The tree of one YAML document; `source` is the file's name in marks and messages.

    Raises RecipeError with every problem of structure, or the first of syntax.
    """
    builder = _Builder(source)
    try:
        value = builder.document(yaml.parse(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        raise RecipeError(source, [_syntax(error, source)]) from None
    except UnicodeError:
        raise RecipeError(source, [Problem("", "not YAML: the text is not valid Unicode", file=source)]) from None
    if builder.problems:
        raise RecipeError(source, builder.problems)
    return value


def read_value(text: str, source: str) -> Any:
    """The value of an override: one YAML value, flow style as a rule. Raises RecipeError."""
    return read(text, source)


def write(data: Any) -> str:
    """YAML text that `read` turns back into the same data, in the order given."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120))


class _Enough(Exception):
    """The document is too large or too deep to go on."""


class _Builder:
    """Events of one document into a tree; problems are collected."""

    def __init__(self, source: str):
        self.source = source
        self.problems: list[Problem] = []
        self.anchors: dict[str, Any] = {}
        self.open: set[str] = set()
        self.count = 0

    def document(self, events: Iterator[Any]) -> Any:
        value = None
        documents = 0
        try:
            for event in events:
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        self.problem("", "a recipe is one YAML document, a second one starts here", event)
                        return value
                elif isinstance(event, yaml.NodeEvent):
                    value = self.node(event, events, "", 0)
        except _Enough:
            pass
        return value

    def node(self, event: Any, events: Iterator[Any], path: str, depth: int) -> Any:
        self.count += 1
        if depth > DEEPEST or self.count > LARGEST:
            rule = f"nested deeper than {DEEPEST} levels" if depth > DEEPEST else f"more than {LARGEST} values"
            self.problem("", rule, event)
            raise _Enough
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, path)
        if event.tag is not None:
            self.problem(path, f"tags are refused, got {_tag(event.tag)}", event, "write plain values")
        if event.anchor is not None:
            self.open.add(event.anchor)
        value = self.value(event, events, path, depth)
        if event.anchor is not None:
            self.open.discard(event.anchor)
            self.anchors[event.anchor] = value
        return value

    def value(self, event: Any, events: Iterator[Any], path: str, depth: int) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            items = Seq(self.mark(event))
            while not isinstance(inner := next(events), yaml.SequenceEndEvent):
                place = f"{path}.{len(items)}" if path else str(len(items))
                items.put(self.node(inner, events, place, depth + 1), self.mark(inner))
            return items
        node = Map(self.mark(event))
        while not isinstance(inner := next(events), yaml.MappingEndEvent):
            self.entry(node, inner, events, path, depth)
        return node

    def entry(self, node: Map, event: Any, events: Iterator[Any], path: str, depth: int) -> None:
        mark = self.mark(event)
        if not isinstance(event, yaml.ScalarEvent):
            self.problem(path, "a key is plain text, not a list, a mapping or an alias", event)
            key = None
            if not isinstance(event, yaml.AliasEvent):
                self.node(event, events, path, depth + 1)
        else:
            key = event.value
            if event.tag is not None:
                self.problem(path, f"tags are refused, got {_tag(event.tag)}", event, "write plain values")
        place = f"{path}.{key}" if path else str(key)
        value = self.node(next(events), events, place, depth + 1)
        if key is None:
            return
        if key in node:
            self.problem(place, f"this key was given on line {node.marks[key].line} already", event, "remove one")
            return
        if key == "<<" and event.implicit[0]:
            self.problem(place, "YAML merge keys are not part of a recipe", event, "use 'extends' or ${path.to.node}")
        node.put(key, value, mark)

    def alias(self, event: Any, path: str) -> Any:
        if event.anchor in self.open:
            self.problem(path, f"*{event.anchor} contains itself", event)
            return None
        if event.anchor not in self.anchors:
            self.problem(path, f"no anchor &{event.anchor} stands before this", event, f"quote it: '*{event.anchor}'")
            return None
        return self.unfold(self.anchors[event.anchor], event, path)

    def unfold(self, node: Any, event: Any, path: str) -> Any:
        """A copy of what an anchor stands for, counted: a short file can unfold to more than memory holds."""
        self.count += 1
        if self.count > LARGEST:
            self.problem(path, f"aliases unfold to more than {LARGEST} values", event)
            raise _Enough
        if isinstance(node, Map):
            twin = Map(node.mark)
            for key, value in node.items():
                twin.put(key, self.unfold(value, event, path), node.marks[key])
            return twin
        if isinstance(node, Seq):
            items = Seq(node.mark)
            for value, mark in zip(node, node.marks, strict=True):
                items.put(self.unfold(value, event, path), mark)
            return items
        return node

    def mark(self, event: Any) -> Mark:
        return Mark(self.source, event.start_mark.line + 1)

    def problem(self, path: str, rule: str, event: Any, fix: str = "") -> None:
        mark = self.mark(event)
        self.problems.append(Problem(path, rule, fix, mark.line, mark.file))


def _tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _syntax(error: yaml.YAMLError, source: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    fix = "quote it: '*'" if "alias" in str(error) else ""
    return Problem("", f"not YAML: {what}", fix, mark.line + 1 if mark else None, source)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes every text that `scalar` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> Any:
    quoted = not isinstance(scalar(value), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if quoted else None)


_Dumper.add_representer(str, _text)
