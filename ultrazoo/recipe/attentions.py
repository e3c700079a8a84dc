"""Layer maps: the nodes of ``attention`` and ``steps`` as typed specs per layer.

Each distinct node is parsed once, once per item of its cycles where it has some; layers share the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import registry
from ..errors import Problem, UltrazooError
from ..options import got, join, parse_part
from ..spec import AttentionSpec, Site
from . import cycles
from .layers import Axis, assign, spans
from .resolved import specs_of
from .tree import Map

MOST_EXPANSIONS = 8
"""Longest chain of named compositions that expand to each other."""


@dataclass(frozen=True)
class Placed:
    """A parsed node and where it was written: problems of `spec` lie below `path`, cycles taken into account."""

    spec: AttentionSpec
    path: str
    swaps: cycles.Swaps

    def problem(self, found: Problem) -> Problem:
        """A problem of the spec, seen from the recipe."""
        return replace(found, path=cycles.written(found.path, self.swaps)).under(self.path)


class Nodes:
    """Parses the nodes of one layer map; problems are collected in `problems`, each once."""

    def __init__(self, node: Map, path: str):
        self.node = node
        self.path = path
        self.problems: list[Problem] = []
        self._parsed: dict[tuple[str, int], Placed | None] = {}
        self._periods: dict[str, int] = {}
        self._open: set[str] = set()
        for key, value in node.items():
            broken = cycles.problems(value, join(path, key))
            if broken:
                self.problems += broken
                self._open.add(key)
            self._periods[key] = 1 if broken else cycles.period(value)

    def at(self, key: str, layer: int) -> Placed | None:
        """What the entry `key` says for `layer`; None where it is wrong."""
        if key in self._open:
            return None
        phase = layer % self._periods[key]
        if (key, phase) not in self._parsed:
            self._parsed[key, phase] = self._parse(key, phase)
        return self._parsed[key, phase]

    def every(self) -> None:
        """Parse every entry in every phase, also those that no layer uses: their mistakes are mistakes."""
        for key, period in self._periods.items():
            for phase in range(min(period, 1000)):
                self.at(key, phase)

    def _parse(self, key: str, phase: int) -> Placed | None:
        path = join(self.path, key)
        node, swaps = cycles.at(self.node[key], phase)
        spec, found = parse_part("attention", node)
        self.problems += [replace(problem, path=cycles.written(problem.path, swaps)).under(path) for problem in found]
        return None if spec is None else Placed(spec, path, swaps)


def layer_map(
    node: Any, axis: Axis | None, path: str, *, complete: bool
) -> tuple[dict[int, Placed], list[Problem], bool]:
    """The spec that holds in every layer, all problems, and whether the map can be used.

    `axis` None means that the layers are not known: nodes are parsed all the same. `complete` asks for an attention in
    every layer.
    """
    if not isinstance(node, Map) or not node:
        example = '"*": full'
        return (
            {},
            [Problem(path, f"expected layer keys with an attention each, got {got(node)}", f"write {example}")],
            False,
        )
    nodes = Nodes(node, path)
    nodes.every()
    if axis is None:
        return {}, nodes.problems, False
    keys, problems = assign(list(node), axis, path)
    missing = [index for index, key in enumerate(keys) if key is None]
    if complete and missing and not problems:
        rule = f"{axis.item} {spans(missing)} of {axis.whole} has no attention"
        problems.append(Problem(path, rule, "add an entry '*' for the rest"))
    placed = {}
    for layer, key in enumerate(keys):
        found = nodes.at(key, layer) if key is not None else None
        if found is not None:
            placed[layer] = found
    problems += nodes.problems
    return placed, problems, not problems


class Expander:
    """Checks specs at their sites and expands named compositions; equal results are one object."""

    def __init__(self) -> None:
        self._same: dict[Any, AttentionSpec] = {}

    def expand(self, placed: Placed, site: Site) -> tuple[AttentionSpec, list[Problem]]:
        """What the spec stands for at `site`, and everything wrong with it there."""
        spec = placed.spec
        found = spec.problems(site) or [*_uncounted(spec, site), *_wrong_heads(spec, site)]
        try:
            for _ in range(MOST_EXPANSIONS):
                if found:
                    break
                wider = spec.expand(site)
                if wider is spec or wider == spec:
                    break
                spec = wider
                found = [
                    replace(one, path="", rule=f"as it expands, at {one.path or 'the top'}: {one.rule}")
                    for one in spec.problems(site)
                ]
        except UltrazooError as error:
            found = [Problem("", f"{spec.name!r} cannot be expanded: {error}")]
        return self.one(spec), [placed.problem(one) for one in found]

    def one(self, spec: AttentionSpec) -> AttentionSpec:
        try:
            return self._same.setdefault(spec, spec)
        except TypeError:
            # a spec made in Python may hold what cannot be hashed
            return spec


def _uncounted(spec: AttentionSpec, site: Site) -> list[Problem]:
    """A part that names sampling steps in a recipe that does not say how many there are."""
    if site.steps is not None or not any(getattr(one, "counts_steps", False) for one in specs_of(spec)):
        return []
    rule = "counts sampling steps, and the recipe does not say how many there are"
    return [Problem("", rule, "add sampling: {steps: 30}")]


def _wrong_heads(spec: AttentionSpec, site: Site) -> list[Problem]:
    """A kernel by name that takes no heads of the backbone's size."""
    found = []
    for one in specs_of(spec):
        kernel = getattr(one, "kernel", "auto")
        why = "" if kernel == "auto" else registry.find("kernel", kernel).wrong_head(site.head_dim)
        if why:
            rule = f"{kernel!r} can never run for this backbone: {why}"
            found.append(Problem("kernel" if one is spec else "", rule, "use auto, or another kernel"))
    return found
