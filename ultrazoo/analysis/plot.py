"""The comparison of plans as a picture: one row per plan, one panel per figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cost import units
from .comparison import Compared, peak_bytes, smallest, starts, visited_share
from .pictures import ELSEWHERE, HERE, INK, STYLE, image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..recipe import Plan

_TOP, _FOOT, _ROW, _PANEL, _GAP = 0.9, 0.55, 0.42, 1.75, 0.25


@dataclass(frozen=True)
class Panel:
    """Bars of one figure. `value` gives the number, None where there is none, `text` the words beside the bar."""

    title: str
    value: Callable[[Compared], float | None]
    text: Callable[[Compared], str]


def _gpu(compared: Sequence[Compared]) -> str | None:
    """The GPU whose seconds are drawn: one that all have, the usual one where they have it."""
    known = [{one.gpu for one in each.plan.seconds} for each in compared]
    shared = set.intersection(*known) if known else set()
    return "H100 80GB" if "H100 80GB" in shared else min(shared, default=None)


def _seconds(compared: Sequence[Compared]) -> Panel:
    """A clip, or one forward of each where some plan has no sampling."""
    gpu = _gpu(compared)
    found = {id(one): next((row for row in one.plan.seconds if row.gpu == gpu), None) for one in compared}
    clips = all(row is None or row.clip is not None for row in found.values())

    def value(one: Compared) -> float | None:
        row = found[id(one)]
        return None if row is None else row.clip if clips else row.forward

    def text(one: Compared) -> str:
        seconds = value(one)
        return "–" if seconds is None else units.duration(seconds)

    return Panel(f"{'clip' if clips else 'forward'} on {gpu}", value, text)


def panels(compared: Sequence[Compared]) -> list[Panel]:
    """What is drawn, left to right."""
    return [
        Panel("visited share of full", lambda c: visited_share(c.plan), lambda c: units.percent(visited_share(c.plan))),
        Panel("coverage, layers", lambda c: c.coverage.layers, lambda c: c.coverage.short()),
        Panel(
            "attention, one forward",
            lambda c: c.plan.totals.attention_flops,
            lambda c: units.flops(c.plan.totals.attention_flops),
        ),
        Panel("one forward", lambda c: c.plan.totals.flops, lambda c: units.flops(c.plan.totals.flops)),
        Panel("parameters", lambda c: c.plan.totals.parameters, _parameters),
        Panel("weights + activations", _memory, lambda c: units.gib(_memory(c))),
        Panel("peak in one attention", lambda c: peak_bytes(c.plan), lambda c: units.gib(peak_bytes(c.plan))),
        _seconds(compared),
    ]


def _memory(one: Compared) -> int:
    return one.plan.totals.weight_bytes + one.plan.totals.activation_bytes.infer


def _parameters(one: Compared) -> str:
    totals = one.plan.totals
    added = f", {units.params(totals.extra_parameters)} new" if totals.extra_parameters else ""
    return units.params(totals.parameters) + added


def plot(compared: Sequence[Compared], form: str = "png") -> bytes:
    """The picture as bytes, ``png`` or ``svg``, the same bytes every time."""
    return image(figure(compared), form)


def figure(compared: Sequence[Compared]) -> Figure:
    """Rows of plans, each with its name, how it starts and the smallest GPU that fits; a panel of bars per figure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = panels(compared)
    names = [[one.name, _start(one.plan), _fits(one.plan)] for one in compared]
    left = 0.2 + max(0.085 * len(line[0]) for line in names)
    left = max(left, 0.2 + max(0.06 * len(text) for line in names for text in line[1:]))
    wide = left + (_PANEL + _GAP) * len(drawn) + 0.1
    row = _ROW + 0.2
    tall = _TOP + row * len(compared) + _FOOT
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(wide, tall), dpi=120)
        made.text(0.12 / wide, 1 - 0.25 / tall, "Plans side by side", weight="bold", fontsize=11, va="center")
        for place, (name, start, fits) in enumerate(names):
            middle = tall - _TOP - row * (place + 0.5)
            made.text(0.12 / wide, (middle + 0.15) / tall, name, fontsize=9, weight="bold", va="center")
            made.text(0.12 / wide, (middle - 0.02) / tall, start, fontsize=6.5, va="center")
            made.text(0.12 / wide, (middle - 0.15) / tall, fits, fontsize=6.5, va="center")
        for column, panel in enumerate(drawn):
            at = (left + (_PANEL + _GAP) * column) / wide
            axes = made.add_axes((at, _FOOT / tall, _PANEL / wide, row * len(compared) / tall))
            _bars(axes, panel, compared)
        made.text(0.12 / wide, 0.2 / tall, _foot(compared), fontsize=7, va="center")
    return made


def _bars(axes: Axes, panel: Panel, compared: Sequence[Compared]) -> None:
    values = [panel.value(one) for one in compared]
    known = [value for value in values if value is not None]
    top = max(known, default=0) or 1
    best = min(known, default=None)
    colours: list[Any] = [HERE if value == best and len(set(known)) > 1 else ELSEWHERE for value in values]
    places = range(len(compared))
    axes.barh(list(places), [value or 0 for value in values], height=0.34, color=colours)
    for place, one in zip(places, compared, strict=True):
        axes.text(0, place - 0.34, panel.text(one), fontsize=7.5, va="center", color=INK)
    axes.set_xlim(0, top)
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_title(panel.title, loc="left", fontsize=8.5, weight="bold", pad=6)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _start(plan: Plan) -> str:
    """How the designs start, without their sources."""
    kinds = dict.fromkeys(start.partition(" (")[0] for start in starts(plan))
    return "starts " + ", ".join(kinds)


def _fits(plan: Plan) -> str:
    infer, train = smallest(plan, "infer"), smallest(plan, "train_checkpointed")
    return f"runs on {infer or 'no one GPU'}; trains on {train or 'no one GPU'}"


def _foot(compared: Sequence[Compared]) -> str:
    """What the marks of the figures stand for, those that occur."""
    lines = [
        "batch 1; darker: the least of a panel; training with checkpoints; coverage is counted back from the last layer"
    ]
    if any(one.coverage.how == "shrunken" for one in compared):
        lines.append("≈ estimated on a smaller grid")
    if any(one.coverage.how == "sampled" for one in compared):
        lines.append("large grids are followed from sampled queries")
    if any(one.coverage.selects for one in compared):
        lines.append("≥ where the data select")
    return "; ".join(lines)
