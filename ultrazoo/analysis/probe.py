"""Designs ranked on a model's own queries, keys and values, before anything is trained.

A capture is what makes the ranking mean something: on random weights attention is nearly uniform, every sparse design looks
the same and a mean of values looks best, so nothing is ranked without one, nor on one of a model that was never trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, UsageError, listed
from ..recipe.layers import spans
from ..recipe.tree import located
from .capture import chosen
from .capture_files import Capture, Item
from .probe_host import CannotReplay
from .probe_measure import Measured, measure, scene
from .probe_recipes import Candidate, candidate

QUERIES = 256
WHY_NOT = (
    "nothing is ranked without a capture. On random weights the softmax is nearly uniform: all sparse designs miss the same "
    "mass and averages look exact, which says nothing about a trained model. Record your model's own queries and keys with "
    "`ultrazoo capture PIPELINE_DIR …` (or ultrazoo.capture in Python) and give --capture DIR"
)


@dataclass(frozen=True)
class Point:
    """One recipe at one item."""

    item: Item
    attention: str
    measured: Measured


@dataclass
class Row:
    """One recipe: what was measured, and what could not be, by its reason. `notes` qualify the figures."""

    name: str
    points: list[Point] = field(default_factory=list)
    lacking: dict[str, list[Item]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every item was measured: only such rows are compared with others."""
        return bool(self.points) and not self.lacking

    @property
    def error(self) -> float | None:
        """RMS of the difference over RMS of full attention, over all items and heads together."""
        pairs = [pair for point in self.points for pair in point.measured.squares]
        return math.sqrt(sum(a for a, _ in pairs) / sum(b for _, b in pairs)) if pairs else None

    @property
    def worst(self) -> tuple[float, Item, int] | None:
        """Largest error of one head, its item and its place among the captured heads."""
        found = [(e, p.item, h) for p in self.points for h, e in enumerate(p.measured.error)]
        return max(found, key=lambda one: one[0], default=None)

    @property
    def recall(self) -> float | None:
        """Mean over items and heads; None unless every item has it."""
        found = [point.measured.recall for point in self.points]
        if not found or any(one is None for one in found):
            return None
        values = [value for one in found if one is not None for value in one]
        return sum(values) / len(values)

    @property
    def share(self) -> float | None:
        found = [point.measured.share for point in self.points]
        known = [one for one in found if one is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None

    @property
    def seconds(self) -> float | None:
        return sum(point.measured.seconds for point in self.points) if self.points else None

    @property
    def full_seconds(self) -> float | None:
        return sum(point.measured.full_seconds for point in self.points) if self.points else None

    @property
    def relative_time(self) -> float | None:
        """Time over that of full attention on the same items."""
        return self.seconds / self.full_seconds if self.seconds is not None and self.full_seconds else None

    @property
    def kernels(self) -> str:
        return ", ".join(dict.fromkeys(point.measured.kernel for point in self.points))

    @property
    def remarks(self) -> list[str]:
        """Notes, what figures leave out, and what could not be replayed."""
        found = dict.fromkeys(self.notes)
        for point in self.points:
            found.update(dict.fromkeys(f"{name}: {why}" for name, why in point.measured.why.items()))
        for why, items in self.lacking.items():
            where = "" if not self.points else f" at layers {spans(one.layer for one in items)}"
            found[f"not replayed{where}: {why}"] = None
        return list(found)


@dataclass(frozen=True)
class Probe:
    """The rows of one run, best first: by error, those that could not be replayed last."""

    capture: Capture
    rows: tuple[Row, ...]
    queries: int
    device: str
    dtype: str

    def front(self, cost: str) -> list[Row]:
        """Rows that no other beats in error and `cost` (``relative_time`` or ``share``) at once, cheapest first."""
        able = [row for row in self.rows if row.whole and row.error is not None and getattr(row, cost) is not None]
        able.sort(key=lambda row: (getattr(row, cost), row.error))
        kept: list[Row] = []
        for row in able:
            if not kept or row.error < kept[-1].error:  # type: ignore[operator]
                kept.append(row)
        return kept


def probe(
    sources: Sequence[Any],
    capture: str | Path | Capture | None,
    *overrides: str,
    layers: str = "*",
    steps: str = "*",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    queries: int = QUERIES,
    say: Callable[[str], None] | None = None,
) -> Probe:
    """Replay recipes on a capture and say how far each is from full attention.

    `sources` are recipes by path, name or as mappings; `layers` and `steps` keys of captured ones. `dtype` None means fp32
    on a CPU and the capture's own elsewhere. Recall looks at `queries` sampled queries of each item. `say` is told what is
    being done. Raises UsageError without a capture, for one of an untrained or another model, or that holds nothing asked for;
    RecipeError for a recipe that cannot run at the capture's grid.
    """
    if capture is None:
        raise UsageError(WHY_NOT)
    if not sources:
        raise UsageError("probe needs a recipe, by path or name")
    if queries < 1:
        raise UsageError(f"recall looks at 1 query or more, got {queries}")
    held = capture if isinstance(capture, Capture) else Capture.load(capture)
    _require_trained(held)
    where = torch.device(device)
    kind = dtype or (torch.float32 if where.type == "cpu" else None)
    items = _items(held, layers, steps)
    model = next(iter(held.models.values()))
    names = _names(sources)
    found = [candidate(one, overrides, model, name) for one, name in zip(sources, names, strict=True)]
    _check(held, found, items)
    rows = [Row(one.name, notes=_notes(one, held, items)) for one in found]
    for number, item in enumerate(items):
        if say is not None:
            say(f"item {number + 1} of {len(items)}: {item.file}")
        shown = scene(held, item, where, kind, queries)
        for one, row in zip(found, rows, strict=True):
            _measure(one, row, shown)
    rows.sort(key=lambda row: (not row.whole, row.error if row.error is not None else math.inf))
    return Probe(held, tuple(rows), queries, str(where), str(kind or items[0].dtype).removeprefix("torch."))


def _measure(one: Candidate, row: Row, shown: Any) -> None:
    item = shown.item
    try:
        spec = one.at(shown.site, item.step)
        if one.weights is not None and spec.cost(shown.site).parameters:
            raise CannotReplay(
                f"its own parameters are trained ({one.weights}), and a probe runs designs as they start; leave weights out "
                "(weights=null) to see that start"
            )
        measured = measure(spec, shown, one.seed)
    except CannotReplay as error:
        row.lacking.setdefault(str(error), []).append(item)
        return
    row.points.append(Point(item, spec.name, measured))


def _require_trained(held: Capture) -> None:
    random = [one.model for one in held.models.values() if one.weights == "random"]
    if random:
        raise UsageError(
            f"{held.directory} was captured from {listed(random)} with the random numbers that its seed gives: {WHY_NOT}"
        )


def _items(held: Capture, layers: str, steps: str) -> list[Item]:
    """The items of the layers and steps asked for. Raises UsageError where there are none, with what is there."""
    if not held.items:
        raise UsageError(f"{held.directory} holds no item yet; run the capture again")
    model = next(iter(held.models.values()))
    wanted = set(chosen(layers, model.groups, "layer", model.model))
    found = [item for item in held.items if item.layer in wanted]
    counts = {item.step[1] for item in held.items if item.step is not None}
    if steps != "*":
        if len(counts) != 1:
            raise UsageError(f"{held.directory} was captured outside a sampling run: it has no steps to choose by")
        (count,) = counts
        at = set(chosen(steps, {"": count}, "step", f"sampling with {count} steps"))
        found = [item for item in found if item.step is not None and item.step[0] in at]
    if not found:
        there = spans(item.layer for item in held.items)
        moments = spans(item.step[0] for item in held.items if item.step is not None)
        raise UsageError(
            f"{held.directory} holds nothing of layers {layers}, steps {steps}: it has layers {there}"
            + (f", steps {moments}" if moments else "")
        )
    return found


def _check(held: Capture, found: Sequence[Candidate], items: Sequence[Item]) -> None:
    """Raise RecipeError with everything that keeps a recipe from running at the capture's grids, before anything runs."""
    for one in found:
        problems: dict[Any, None] = {}
        for item in items:
            site = held.models[item.component].site.at(layer=item.layer, grid=item.grid, extra=item.segments)
            try:
                one.at(site, item.step)
            except RecipeError as error:
                problems.update(dict.fromkeys(error.problems))
        if problems:
            grids = listed(dict.fromkeys(str(item.grid) for item in items))
            raise RecipeError(f"{one.source} at the capture's grid {grids}", located(list(problems), one.tree))


def _notes(one: Candidate, held: Capture, items: Sequence[Item]) -> list[str]:
    notes = []
    if one.grid is not None and any(item.grid != one.grid for item in items):
        grids = listed(dict.fromkeys(str(item.grid) for item in items))
        notes.append(f"at the capture's grid {grids}, the recipe's is {one.grid}")
    starts = {}
    for item in items:
        site = held.models[item.component].site.at(layer=item.layer, grid=item.grid, extra=item.segments)
        spec = one.at(site, item.step)
        if spec.cost(site).parameters:
            starts[spec.name] = spec.traits().start
    notes += [f"{name} runs with its own parameters as they start: {start}" for name, start in starts.items()]
    return notes


def _names(sources: Sequence[Any]) -> list[str | None]:
    """Names that tell recipes apart: numbered where one is named twice; None leaves a recipe its own."""
    return [
        f"{one}#{list(sources[: at + 1]).count(one)}" if isinstance(one, str) and list(sources).count(one) > 1 else None
        for at, one in enumerate(sources)
    ]
