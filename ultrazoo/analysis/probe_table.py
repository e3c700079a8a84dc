"""A probe as rows of text and as plain data."""

from __future__ import annotations

from typing import Any

from ..cost import units
from .probe import Point, Probe, Row

HEADERS = ("recipe", "error", "worst head", "recall", "visited", "time", "of full", "kernel")
RIGHT = "rrrrrrr"
DETAIL = ("recipe", "layer", "step", "sample", "head", "attention", "error", "recall", "visited", "time")
NONE = "–"


def summary(probe: Probe) -> list[tuple[str, ...]]:
    """One row per recipe, in the order of `Probe.rows`; those on a front of error and cost are marked ``*``."""
    best = {row.name for cost in ("relative_time", "share") for row in probe.front(cost)}
    return [_line(row, row.name in best) for row in probe.rows]


def _line(row: Row, best: bool) -> tuple[str, ...]:
    worst, seconds = row.worst, row.seconds
    return (
        f"{row.name}{' *' if best else ''}",
        _number(row.error),
        NONE if worst is None else _number(worst[0]),
        _share(row.recall),
        _share(row.share),
        NONE if seconds is None else units.duration(seconds),
        _share(row.relative_time),
        row.kernels or "not replayed",
    )


def detail(probe: Probe) -> list[tuple[str, ...]]:
    """One row per recipe, layer, step, sample and head."""
    return [line for row in probe.rows for point in row.points for line in _heads(probe, row, point)]


def _heads(probe: Probe, row: Row, point: Point) -> list[tuple[str, ...]]:
    item, found = point.item, point.measured
    step = NONE if item.step is None else str(item.step[0])
    return [
        (
            row.name,
            str(item.layer),
            step,
            str(item.sample),
            str(head),
            point.attention,
            _number(found.error[at]),
            NONE if found.recall is None else _share(found.recall[at]),
            _share(found.share),
            units.duration(found.seconds),
        )
        for at, head in enumerate(probe.capture.heads)
    ]


def remarks(probe: Probe) -> list[str]:
    """What qualifies the figures, one line each."""
    first = next(iter(probe.capture.models.values()))
    items = {point.item.file: point.item for row in probe.rows for point in row.points}
    kept = len(probe.capture.heads)
    figures = "error: RMS of the difference over RMS of full attention, in front of the output projection"
    lines = [
        f"{len(items)} captured layers of {first.model}, {kept} of {first.site.heads} heads, {probe.dtype} on {probe.device}; {figures}",
        f"recall: softmax mass of the visited keys over at most {probe.queries} sampled queries of each; time: attention alone",
    ]
    if not probe.capture.complete:
        lines.append("the capture is not complete: what is there was probed")
    lines += [f"{row.name}: {remark}" for row in probe.rows for remark in row.remarks]
    return lines


def data(probe: Probe) -> dict[str, Any]:
    """Everything, per layer, step and head."""
    fronts = {cost: [row.name for row in probe.front(cost)] for cost in ("relative_time", "share")}
    return {
        "capture": str(probe.capture.directory),
        "complete": probe.capture.complete,
        "models": {name: one.model for name, one in probe.capture.models.items()},
        "heads": list(probe.capture.heads),
        "device": probe.device,
        "dtype": probe.dtype,
        "queries": probe.queries,
        "pareto": {"error_time": fronts["relative_time"], "error_visited": fronts["share"]},
        "recipes": [_row_data(row) for row in probe.rows],
    }


def _row_data(row: Row) -> dict[str, Any]:
    worst = row.worst
    return {
        "name": row.name,
        "error": row.error,
        "worst": None
        if worst is None
        else {"error": worst[0], "layer": worst[1].layer, "step": _step(worst[1]), "head_index": worst[2]},
        "recall": row.recall,
        "visited_share": row.share,
        "seconds": row.seconds,
        "full_seconds": row.full_seconds,
        "relative_time": row.relative_time,
        "kernels": row.kernels,
        "notes": row.remarks,
        "not_replayed": [
            {"layer": item.layer, "step": _step(item), "sample": item.sample, "why": why}
            for why, items in row.lacking.items()
            for item in items
        ],
        "items": [_point_data(point) for point in row.points],
    }


def _point_data(point: Point) -> dict[str, Any]:
    item, found = point.item, point.measured
    return {
        "file": item.file,
        "layer": item.layer,
        "step": _step(item),
        "sample": item.sample,
        "grid": list(item.grid),
        "attention": point.attention,
        "error": list(found.error),
        "recall": None if found.recall is None else list(found.recall),
        "recall_5_percent": found.recall_low,
        "visited_share": found.share,
        "seconds": found.seconds,
        "full_seconds": found.full_seconds,
        "kernel": found.kernel,
        "why": dict(found.why),
    }


def _step(item: Any) -> int | None:
    return None if item.step is None else item.step[0]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return NONE if value is None else units.percent(value)
