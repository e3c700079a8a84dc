"""``key=value`` overrides: a dotted path, then a YAML value, applied in the order given.

``attention.*.branches.local.layout.counts=[5, 5]``, ``attention.0-2,27-29=full``, ``attention.*.fuse.order.0=global``. A
segment with a dot or a sign of equality in it is quoted. Another ``name`` drops the options of the old one, those given
before on the same command line excepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import Problem, RecipeError
from . import text
from .merge import Keys, delete, deletes, drop, merge, named, rivals
from .tree import Map, Mark, Seq, copy, split

PLACE = "command line"


def apply(tree: Map, overrides: Sequence[str]) -> tuple[Map, list[Problem]]:
    """The tree with every override applied, and the overrides that could not be."""
    tree = copy(tree)
    problems: list[Problem] = []
    given: list[Keys] = []
    for override in overrides:
        keys, value, found = read(override)
        if not found:
            found = _Setter(tree, given).set(keys, value)
            given.append(keys)
        problems += found
    return tree, problems


def put(tree: Map, path: str, value: Any) -> tuple[Map, list[Problem]]:
    """The tree with a value in the place of the entry at a dotted path."""
    keys, rest = split(tree, path)
    tree = copy(tree)
    return tree, _Setter(tree, []).set((*keys, *rest.split(".")) if rest else keys, value)


def read(override: str) -> tuple[Keys, Any, list[Problem]]:
    """Path and value of one override, or what is wrong with it."""
    if not isinstance(override, str):
        return (), None, [Problem("", f"an override is text, key=value, got {override!r}", file=PLACE)]
    keys, rest, problem = _split(override)
    if not problem and not rest.strip():
        problem, fix = "there is no value after the sign of equality", f"write {override}null or {override}''"
    else:
        fix = "overrides are dotted.path=value"
    if problem:
        return (), None, [Problem(override, problem, fix, file=PLACE)]
    try:
        value = text.read_value(rest, PLACE)
    except RecipeError as error:
        return (), None, [Problem(override, one.rule, one.fix, file=PLACE) for one in error.problems]
    return keys, _unlined(value), []


def _split(override: str) -> tuple[Keys, str, str]:
    """Segments before the first sign of equality outside quotes, and the text behind it."""
    keys: list[str] = []
    segment, quote, quoted = "", "", False
    for index, char in enumerate(override):
        if quote:
            if char == quote:
                quote = ""
            else:
                segment += char
        elif char in "'\"" and not segment:
            quote, quoted = char, True
        elif char in ".=":
            segment = segment if quoted else segment.strip()
            if not segment:
                return (), "", "an empty segment in the path"
            keys.append(segment)
            if char == "=":
                return tuple(keys), override[index + 1 :], ""
            segment, quoted = "", False
        elif quoted:
            return (), "", f"{char!r} follows a closing quote"
        else:
            segment += char
    return (), "", "a quote that is not closed" if quote else "no sign of equality"


def _unlined(node: Any) -> Any:
    """The value with marks that name the command line and no line."""
    if isinstance(node, Map):
        twin = Map(Mark(PLACE))
        for key, value in node.items():
            twin.put(key, _unlined(value), Mark(PLACE))
        return twin
    if isinstance(node, Seq):
        items = Seq(Mark(PLACE))
        for value in node:
            items.put(_unlined(value), Mark(PLACE))
        return items
    return node


class _Setter:
    """Sets one value in a tree, making the mappings on the way."""

    def __init__(self, tree: Map, given: Sequence[Keys]):
        self.tree = tree
        self.given = given

    def set(self, keys: Keys, value: Any) -> list[Problem]:
        node: Any = self.tree
        for depth, key in enumerate(keys[:-1]):
            child = self.child(node, key)
            if child is None or isinstance(child, str):
                # a part written by its bare name, or an entry that is new
                child = named(child, Mark(PLACE)) if isinstance(child, str) else Map(Mark(PLACE))
                problem = self.store(node, key, child, keys[: depth + 1])
                if problem:
                    return [problem]
            elif not isinstance(child, (Map, Seq)):
                rule = f"{self.shown(keys[: depth + 1])} is {child!r} and holds nothing"
                return [Problem(self.shown(keys), rule, file=PLACE)]
            node = child
        return self.put(node, keys, value)

    def child(self, node: Any, key: str | int) -> Any:
        if isinstance(node, Seq):
            index = _index(node, key)
            return None if index is None else node[index]
        return node.get(key)

    def put(self, node: Any, keys: Keys, value: Any) -> list[Problem]:
        key = keys[-1]
        if isinstance(node, Map):
            if value is None and deletes(keys):
                return delete(node, keys, Mark(PLACE))
            if key == "name" and len(keys) > 1 and node.get("name") not in (None, value):
                self.rename(node, keys[:-1])
            if keys[:-1] == ("video",):
                for rival in rivals([str(key)]) - {one[1] for one in self.given if len(one) > 1 and one[0] == "video"}:
                    drop(node, str(rival))
            old = node.get(str(key))
            if isinstance(old, str) and isinstance(value, Map):
                old = named(old, Mark(PLACE))
            if isinstance(value, Map):
                merged, problems = merge(old if isinstance(old, Map) else Map(Mark(PLACE)), value, keys)
                node.put(str(key), merged, Mark(PLACE))
                return problems
        problem = self.store(node, key, value, keys)
        return [problem] if problem else []

    def store(self, node: Any, key: str | int, value: Any, keys: Keys) -> Problem | None:
        if isinstance(node, Map):
            node.put(str(key), value, Mark(PLACE))
            return None
        index = _index(node, key)
        if index is None:
            rule = f"{self.shown(keys[:-1])} is a list of {len(node)}, it has no item {key!r}"
            return Problem(self.shown(keys), rule, f"items are 0 to {len(node) - 1}", file=PLACE)
        node[index] = value
        node.marks[index] = Mark(PLACE)
        return None

    def rename(self, node: Map, keys: Keys) -> None:
        """Drop the options of the old name, except those that this command line gave."""
        kept = {one[len(keys)] for one in self.given if len(one) > len(keys) and one[: len(keys)] == keys}
        for key in [key for key in node if key not in kept]:
            drop(node, key)

    @staticmethod
    def shown(keys: Keys) -> str:
        return ".".join(str(key) for key in keys)


def _index(node: Seq, key: str | int) -> int | None:
    digits = str(key)
    return int(digits) if digits.isdecimal() and int(digits) < len(node) else None
