"""``${path.to.node}`` inside a recipe: OmegaConf's node interpolation, and nothing else of it.

Resolvers (``${oc.env:HOME}``, ``${anything:…}``) would let a recipe read the machine it runs on, so they are refused
before OmegaConf sees the text. OmegaConf is imported only for recipes that interpolate.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import Problem, near
from .tree import DEEPEST, LARGEST, Map, Mark, Seq, from_plain, leaves, plain, size

_RESOLVER = re.compile(r"\$\{\s*([^{}:]*)\s*:")
_OPENING = "${"


def interpolate(tree: Map) -> list[Problem]:
    """Put values in the place of every ``${…}`` of the tree; returns what could not be resolved."""
    found = [(keys, value, mark) for keys, value, mark in leaves(tree) if isinstance(value, str) and _OPENING in value]
    if not found:
        return []
    problems = [problem for keys, value, mark in found for problem in _refused(keys, value, mark)]
    if problems:
        return problems

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for keys, value, mark in found:
        try:
            OmegaConf.create({"value": value})
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_problem(keys, value, mark, error, tree))
    if problems:
        return problems
    config = OmegaConf.create(plain(tree))
    results: list[tuple[tuple[Any, ...], Any, Mark]] = []
    total = 0
    for keys, text, mark in found:
        try:
            node: Any = config
            for key in keys:
                node = node[key]
            made: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except (OmegaConfBaseException, RecursionError, TypeError, KeyError) as error:
            problems.append(_problem(keys, text, mark, error, tree))
            continue
        child, bad = from_plain(made, mark)
        problems += [problem.under(_shown(keys)) for problem in bad]
        total += size(child) + (len(child) if isinstance(child, str) else 0)
        if total > LARGEST:
            rule = f"interpolation unfolds to more than {LARGEST} values"
            return [*problems, Problem(_shown(keys), rule, "", mark.line, mark.file)]
        results.append((keys, child, mark))
    for keys, child, mark in results:
        _store(tree, keys, child, mark)
    return problems


def _store(tree: Map, keys: tuple[Any, ...], value: Any, mark: Mark) -> None:
    node: Any = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    if isinstance(node, (Map, Seq)):
        node.marks[keys[-1]] = mark


def _refused(keys: tuple[Any, ...], text: str, mark: Mark) -> list[Problem]:
    resolver = _RESOLVER.search(text)
    if resolver:
        rule = f"resolvers are refused, got {text!r}: a recipe cannot read anything but itself"
        return [Problem(_shown(keys), rule, "write the value, or ${path.to.a.node}", mark.line, mark.file)]
    if text.count(_OPENING) > DEEPEST:
        return [Problem(_shown(keys), "too many interpolations in one value", "", mark.line, mark.file)]
    return []


def _problem(keys: tuple[Any, ...], text: str, mark: Mark, error: Exception, tree: Map) -> Problem:
    wanted = text.strip()[2:-1]
    fix = ""
    if isinstance(error, RecursionError):
        rule = f"{text!r} refers to itself"
    else:
        rule = f"{text!r} does not resolve: {_cause(error)}"
        names = {_shown(one) for one, _, _ in leaves(tree)}
        fix = "" if wanted in names else near(wanted, names)
    return Problem(_shown(keys), rule, fix, mark.line, mark.file)


def _cause(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _shown(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in keys)
