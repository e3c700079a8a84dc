"""The parts of a recipe beside its attention: head, video, sampling, backbone, weights, search. Types only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import registry
from ..errors import Problem, RegistryError, listed, near
from ..options import declared, got, join, parse, parse_part
from ..spec import BackboneSpec, Video
from .resolved import SCHEMA, Head, Sampling, WeightsSource
from .tree import Map, Seq, lookup, split

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")

HEAD = tuple(row.name for row in declared(Head))
SECTIONS = (*HEAD, "extends", "video", "sampling", "backbone", "attention", "steps", "weights", "search")

MOST_CHOICES = 1000
"""Most values of one searched path: each is tried when the recipe is checked."""


@dataclass(frozen=True)
class Sections:
    """What was read; None where a section is missing or wrong."""

    head: Head | None
    video: Video | None
    sampling: Sampling | None
    backbone: BackboneSpec | None
    backbone_name: str
    weights: WeightsSource | None


def read(tree: Map, name: str) -> tuple[Sections, list[Problem]]:
    """The typed sections of a recipe called `name`, and every problem in them."""
    problems: list[Problem] = []
    for key in tree:
        if key not in SECTIONS:
            rule = f"unknown section {key!r}"
            problems.append(Problem(key, rule, near(key, SECTIONS) or f"sections are {listed(SECTIONS)}"))
    head, found = _head(tree, name)
    problems += found
    video, found = _required(tree, "video", "{width: 832, height: 480, frames: 81}, or {grid: [21, 30, 52]}")
    if video is not None:
        video, found = parse(Video, video, "video")
    problems += found
    sampling, found = _optional(Sampling, tree, "sampling")
    problems += found
    weights, found = _optional(WeightsSource, tree, "weights")
    problems += found
    backbone, found = _required(tree, "backbone", "{name: wan, preset: t2v_1_3b}")
    shown = ""
    if backbone is not None:
        shown = backbone_label(backbone)
        backbone, found = _backbone(backbone)
    problems += found
    return Sections(head, video, sampling, backbone, shown, weights), problems


def _backbone(node: Any) -> tuple[BackboneSpec | None, list[Problem]]:
    """The backbone and what is wrong with it. Where only unknown options are, it still tells layers and sizes, so that
    the rest of the recipe is checked in the same run; a wrong value would make problems elsewhere that are none.
    """
    spec, problems = parse_part("backbone", node, "backbone")
    if spec is None and isinstance(node, Map) and isinstance(node.get("name"), str):
        try:
            cls = registry.find("backbone", node["name"])
        except RegistryError:
            return None, problems
        known = {"name", "preset", *(row.name for row in declared(cls))}
        spec, _ = parse_part("backbone", {key: value for key, value in node.items() if key in known}, "backbone")
    return spec, problems


def backbone_label(node: Any) -> str:
    """A backbone as messages call it: ``wan/t2v_1_3b``."""
    if not isinstance(node, Map):
        return str(node)
    parts = [node.get("name"), node.get("preset")]
    return "/".join(str(one) for one in parts if one)


def _head(tree: Map, name: str) -> tuple[Head | None, list[Problem]]:
    head, problems = parse(Head, {"name": name, **{key: tree[key] for key in HEAD if key in tree}}, label="recipes")
    schema = tree.get("schema", SCHEMA)
    if type(schema) is int and schema != SCHEMA:
        rule = f"this ultrazoo reads schema {SCHEMA}, got {schema}"
        problems.append(Problem("schema", rule, "upgrade ultrazoo" if schema > SCHEMA else f"write schema: {SCHEMA}"))
    written = tree.get("name", name)
    if isinstance(written, str) and not _NAME.fullmatch(written):
        fix = "use letters, digits, '_', '-', '.', '+', a letter or digit first"
        problems.append(Problem("name", f"{got(written)} cannot name an output directory", fix))
    return head, problems


def _required(tree: Map, key: str, example: str) -> tuple[Any, list[Problem]]:
    if tree.get(key) is None:
        return None, [Problem(key, f"a recipe needs the section {key!r}", f"for example {key}: {example}")]
    return tree[key], []


def _optional(cls: type, tree: Map, key: str) -> tuple[Any, list[Problem]]:
    if tree.get(key) is None:
        return None, []
    return parse(cls, tree[key], key)


def search_space(tree: Map) -> tuple[dict[str, Any], list[Problem]]:
    """``search.space``: recipe paths → ``{choice | range | log_range: […]}``; every path must name an entry."""
    node = tree.get("search")
    if node is None:
        return {}, []
    if not isinstance(node, Map):
        return {}, [Problem("search", f"expected a mapping with 'space', got {got(node)}")]
    problems = [
        Problem(join("search", key), "unknown option of search", near(key, ("space",)) or "it has the option 'space'")
        for key in node
        if key != "space"
    ]
    space = node.get("space")
    if not isinstance(space, Map):
        rule = f"expected recipe paths, each with choice, range or log_range, got {got(space)}"
        return {}, [*problems, Problem("search.space", rule)]
    read: dict[str, Any] = {}
    for path, what in space.items():
        found = [*_target(tree, path), *_domain(what)]
        problems += [problem.under(join("search.space", path)) for problem in found]
        if not found:
            read[path] = {key: list(value) for key, value in what.items()}
    return read, problems


def _target(tree: Map, path: str) -> list[Problem]:
    keys, rest = split(tree, path)
    if rest or not keys or keys[0] in ("search", "extends", "name", "schema"):
        here = lookup(tree, keys)
        below = [join(".".join(map(str, keys)), key) for key in here] if isinstance(here, Map) else []
        fix = near(path, below) or "the recipe writes the plain value, the search names its path"
        return [Problem("", "this path names nothing in the recipe", fix)]
    return []


def _domain(what: Any) -> list[Problem]:
    """What is wrong with ``{choice: […]}``, ``{range: [lo, hi, step]}`` or ``{log_range: [lo, hi]}``."""
    forms = ("choice", "range", "log_range")
    if not isinstance(what, Map) or len(what) != 1 or next(iter(what)) not in forms:
        hint = near(str(next(iter(what))), forms) if isinstance(what, Map) and len(what) == 1 else ""
        return [Problem("", f"expected one of {listed(forms)} with a list, got {got(what)}", hint)]
    form, values = next(iter(what.items()))
    if not isinstance(values, Seq) or not values:
        return [Problem(form, f"expected a list, got {got(values)}")]
    if form == "choice":
        too_many = len(values) > MOST_CHOICES
        return [Problem(form, f"{len(values)} choices, at most {MOST_CHOICES}")] if too_many else []
    if not all(type(value) in (int, float) for value in values) or len(values) not in (2, 3):
        return [Problem(form, f"expected [low, high] or [low, high, step], got {got(values)}")]
    low, high, *step = values
    if not low < high or (step and step[0] <= 0) or (form == "log_range" and low <= 0):
        rule = "low is below high, a step is positive" + (", low is positive" if form == "log_range" else "")
        return [Problem(form, f"{rule}, got {got(values)}")]
    return []


def candidates(space: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Values to try: every choice, both ends of every range, with the path of each inside the recipe."""
    rows = []
    for path, what in space.items():
        form, values = next(iter(what.items()))
        for index, value in enumerate(values if form == "choice" else values[:2]):
            rows.append((path, value, f"search.space.{path}.{form}.{index}"))
    return rows
