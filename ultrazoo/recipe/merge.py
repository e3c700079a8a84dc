"""How one recipe is laid over another: mappings merge, lists replace, another ``name`` drops the base's options.

The same rules hold for `extends`, for the mappings given by overrides, and for a ``name=`` given there. A video's grid and
its size in pixels put each other out of force.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import Problem
from .tree import Map, Mark, copy

Keys = tuple[str | int, ...]


def merge(base: Map, over: Map, keys: Keys = ()) -> tuple[Map, list[Problem]]:
    """`over` laid over `base`, both unchanged; problems are nulls that delete nothing."""
    result = copy(Map(base.mark) if keys and replaces(base, over) else base)
    if keys == ("video",):
        for key in rivals(over):
            drop(result, key)
    result.mark = over.mark
    problems: list[Problem] = []
    for key, value in over.items():
        mark = over.marks[key]
        if value is None and deletes((*keys, key)):
            problems += delete(result, (*keys, key), mark)
            continue
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, Map) and keys:
            # a part written by its bare name
            old = named(old, result.marks[key])
        if isinstance(value, Map):
            merged, found = merge(old if isinstance(old, Map) else Map(value.mark), value, (*keys, key))
            problems += found
            result.put(key, merged, mark)
        else:
            result.put(key, copy(value), mark)
    return result, problems


def replaces(base: Map, over: Map) -> bool:
    """Does the node `over` say something else than `base`, so that nothing of `base` stays?"""
    if "cycle" in over or ("cycle" in base and "name" in over):
        return True
    return "name" in over and "name" in base and over["name"] != base["name"]


def deletes(keys: Keys) -> bool:
    """Does null delete the entry here? Entries of ``attention`` and ``steps`` can be deleted, and those of a part's mappings
    that the recipe's author names: ``branches``, ``groups`` of heads and ``steps`` of a budget."""
    if len(keys) == 2 and keys[0] in ("attention", "steps"):
        return True
    return (len(keys) == 3 and keys[0] == "steps") or (len(keys) > 2 and keys[-2] in ("branches", "groups", "steps"))


def delete(node: Map, keys: Keys, mark: Mark) -> list[Problem]:
    """Take the last of `keys` out of its mapping; a problem when it is not there."""
    key = str(keys[-1])
    if key in node:
        drop(node, key)
        return []
    path = ".".join(str(one) for one in keys)
    fix = f"entries are {', '.join(node)}" if node else "remove the line"
    return [Problem(path, "null deletes an entry that the base has, and there is none", fix, mark.line, mark.file)]


def rivals(video: Iterable[str]) -> set[str]:
    """A video's size is given in pixels or as a grid: what the keys of a later one put out of force."""
    if "grid" in video:
        return {"width", "height", "frames"} - set(video)
    return {"grid"} if {"width", "height", "frames"} & set(video) else set()


def drop(node: Map, key: str) -> None:
    """Take an entry out, if it is there."""
    node.pop(key, None)
    node.marks.pop(key, None)


def named(name: str, mark: Mark) -> Map:
    """The mapping that a bare name stands for."""
    node = Map(mark)
    node.put("name", name, mark)
    return node
