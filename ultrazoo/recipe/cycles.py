"""``{cycle: [a, b, …]}`` in place of any option: layer i takes item ``i mod length``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..errors import Problem
from ..options import join
from .tree import Map, Seq

Swaps = tuple[tuple[str, int], ...]
"""Where an item stands in for its cycle: path in the node without cycles, index of the item."""


def is_cycle(node: Any) -> bool:
    return isinstance(node, Map) and isinstance(node.get("cycle"), Seq)


def period(node: Any) -> int:
    """After how many layers a node repeats: the least common multiple of its cycles' lengths."""
    return math.lcm(*(len(one) for one in _cycles(node)), 1)


def _cycles(node: Any) -> Iterator[Seq]:
    if is_cycle(node):
        items = node["cycle"]
        if items:
            yield items
    children = node.values() if isinstance(node, Map) else node if isinstance(node, Seq) else ()
    for child in children:
        yield from _cycles(child)


def at(node: Any, layer: int, path: str = "") -> tuple[Any, Swaps]:
    """The node as `layer` sees it, without cycles, and the swaps made; an empty cycle stays as it is."""
    swaps: list[tuple[str, int]] = []
    if is_cycle(node) and node["cycle"] and len(node) == 1:
        index = layer % len(node["cycle"])
        inner, below = at(node["cycle"][index], layer, path)
        return inner, (*below, (path, index))
    if isinstance(node, Map):
        twin = Map(node.mark)
        for key, value in node.items():
            child, below = at(value, layer, join(path, key))
            twin.put(key, child, node.marks[key])
            swaps += below
        return twin, tuple(swaps)
    if isinstance(node, Seq):
        items = Seq(node.mark)
        for index, value in enumerate(node):
            child, below = at(value, layer, join(path, index))
            items.put(child, node.marks[index])
            swaps += below
        return items, tuple(swaps)
    return node, ()


def written(path: str, swaps: Swaps) -> str:
    """A path in the node without cycles as a path in the node as written. Inner swaps come first."""
    for prefix, index in swaps:
        if not prefix:
            path = join(f"cycle.{index}", path) if path else f"cycle.{index}"
        elif path == prefix or path.startswith(f"{prefix}."):
            path = f"{prefix}.cycle.{index}{path[len(prefix) :]}"
    return path


def problems(node: Any, path: str) -> list[Problem]:
    """Cycles that cannot be one: empty, or with other keys beside them."""
    found: list[Problem] = []
    if is_cycle(node):
        if not node["cycle"]:
            found.append(Problem(join(path, "cycle"), "a cycle needs at least one item"))
        for key in node:
            if key != "cycle":
                rule = f"a cycle stands alone, {key!r} beside it has no meaning"
                found.append(Problem(join(path, key), rule, "move it into the items"))
    children: Any = ()
    if isinstance(node, Map):
        children = node.items()
    elif isinstance(node, Seq):
        children = enumerate(node)
    for key, child in children:
        found += problems(child, join(path, key))
    return found
