"""Recipe data with the place each entry was written: mappings and lists that remember file and line.

A tree holds text, whole numbers, numbers, booleans and null only. Paths are dotted; since layer keys may hold anything, a
dotted path is read against a tree, longest key first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import Problem
from ..options import got, join, to_data
from ..spec import Options, Spec

LARGEST = 100_000
"""Most values in one recipe, aliases written out: a file that unfolds to more is not a recipe."""

DEEPEST = 60


class Mark(NamedTuple):
    """Where an entry was written: a file (or a word for what is none) and a line from 1."""

    file: str | None = None
    line: int | None = None


class Map(dict[str, Any]):
    """A mapping that knows where its entries were written."""

    def __init__(self, mark: Mark = Mark()):
        super().__init__()
        self.mark = mark
        self.marks: dict[str, Mark] = {}

    def put(self, key: str, value: Any, mark: Mark) -> None:
        """Set an entry and where it was written."""
        self[key] = value
        self.marks[key] = mark


class Seq(list[Any]):
    """A list that knows where its items were written."""

    def __init__(self, mark: Mark = Mark()):
        super().__init__()
        self.mark = mark
        self.marks: list[Mark] = []

    def put(self, value: Any, mark: Mark) -> None:
        """Append an item and where it was written."""
        self.append(value)
        self.marks.append(mark)


def from_plain(data: Any, mark: Mark, path: str = "", depth: int = 0) -> tuple[Any, list[Problem]]:
    """A tree from Python data; specs become the data they stand for. Returns the tree and what cannot be in one."""
    if depth > DEEPEST:
        return None, [Problem(path, f"nested deeper than {DEEPEST} levels", "a recipe cannot contain itself")]
    if isinstance(data, (Spec, Options)):
        data = to_data(data)
    problems: list[Problem] = []
    if isinstance(data, Mapping):
        node = Map(mark)
        for key, value in data.items():
            # a layer given as a plain number in Python
            name = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
            if not isinstance(name, str):
                problems.append(Problem(join(path, key), f"keys are text, got {got(key)}"))
                continue
            child, found = from_plain(value, mark, join(path, name), depth + 1)
            node.put(name, child, mark)
            problems += found
        return node, problems
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        items = Seq(mark)
        for index, value in enumerate(data):
            child, found = from_plain(value, mark, join(path, index), depth + 1)
            items.put(child, mark)
            problems += found
        return items, problems
    if data is None or type(data) in (str, int, float, bool):
        return data, []
    return None, [Problem(path, f"recipes hold plain data, got {got(data)}", "write text, numbers, lists or mappings")]


def copy(node: Any) -> Any:
    """The same tree, sharing no container with `node`."""
    if isinstance(node, Map):
        twin = Map(node.mark)
        for key, value in node.items():
            twin.put(key, copy(value), node.marks[key])
        return twin
    if isinstance(node, Seq):
        items = Seq(node.mark)
        for value, mark in zip(node, node.marks, strict=True):
            items.put(copy(value), mark)
        return items
    return node


def plain(node: Any) -> Any:
    """The tree as dicts and lists."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    return node


def size(node: Any) -> int:
    """Values in a tree, containers included."""
    if isinstance(node, Mapping):
        return 1 + sum(size(value) for value in node.values())
    if isinstance(node, list):
        return 1 + sum(size(value) for value in node)
    return 1


def leaves(node: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Mark]]:
    """Every value that is no container: its keys from the top, the value, its mark."""
    if isinstance(node, (Map, Seq)):
        items = node.items() if isinstance(node, Map) else enumerate(node)
        marks: Any = node.marks
        for key, value in items:
            if isinstance(value, (Map, Seq)):
                yield from leaves(value, (*keys, key))
            else:
                yield (*keys, key), value, marks[key]


def split(node: Any, path: str) -> tuple[tuple[str | int, ...], str]:
    """Read a dotted path against a tree: the keys that exist, and the rest of the path."""
    keys: list[str | int] = []
    while path:
        step = _step(node, path)
        if step is None:
            break
        key, path = step
        keys.append(key)
        node = node[key]
    return tuple(keys), path


def _step(node: Any, path: str) -> tuple[str | int, str] | None:
    if isinstance(node, Map):
        fitting = [key for key in node if key == path or path.startswith(f"{key}.")]
        if fitting:
            key = max(fitting, key=len)
            return key, path[len(key) + 1 :]
    if isinstance(node, Seq):
        first, _, rest = path.partition(".")
        if first.isdecimal() and int(first) < len(node):
            return int(first), rest
    return None


def lookup(node: Any, keys: Sequence[str | int]) -> Any:
    """The node behind keys that exist."""
    for key in keys:
        node = node[key]
    return node


def mark_of(node: Any, path: str) -> Mark:
    """Where the entry at a dotted path, or its nearest ancestor that was written, stands."""
    keys, _ = split(node, path)
    mark: Mark = getattr(node, "mark", Mark())
    for key in keys:
        marks: Any = node.marks
        mark = marks[key]
        node = node[key]
    return mark


def located(problems: Sequence[Problem], node: Any) -> list[Problem]:
    """The problems with file and line of what they speak about, in the order of the file."""
    marked = []
    for problem in problems:
        mark = mark_of(node, problem.path)
        marked.append(
            problem if problem.file or problem.line else replace(problem, file=mark.file, line=mark.line),
        )
    marked.sort(key=lambda problem: (problem.file or "", problem.line or 0))
    return list(dict.fromkeys(marked))
