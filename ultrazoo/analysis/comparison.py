"""Several plans side by side: one column per plan, one row per figure, the best of each row marked.

Coverage is followed within its budget (`coverage.BUDGET`), so that a comparison of 4K plans stays a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cost import units
from ..cost.units import layer_list
from .coverage import Coverage, coverage

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipe import Plan

GPUS_SHOWN = ("RTX 4090", "H20 96GB", "H100 80GB", "B200")


@dataclass(frozen=True)
class Figure:
    """One row: where its value comes from, how it reads, and which end is better (None: neither)."""

    name: str
    value: Callable[[Any], Any]
    text: Callable[[Any], str] = str
    better: str | None = "low"


@dataclass(frozen=True)
class Compared:
    """A plan and its coverage. `name` tells plans of one recipe apart."""

    name: str
    plan: Plan
    coverage: Coverage


def compare(plans: Sequence[Plan]) -> list[Compared]:
    """The plans with their coverage; plans of the same name are numbered."""
    names = [plan.name for plan in plans]
    seen: dict[str, int] = {}
    rows = []
    for plan in plans:
        seen[plan.name] = seen.get(plan.name, 0) + 1
        name = plan.name if names.count(plan.name) == 1 else f"{plan.name} #{seen[plan.name]}"
        resolved = plan.resolved
        rows.append(Compared(name, plan, coverage(resolved.sites, resolved.attention, resolved.written)))
    return rows


def visited_share(plan: Plan) -> float:
    """Query-key pairs that kernels visit, masked ones included, over those of full attention."""
    return sum(one.visited for one in plan.layers) / sum(one.full_pairs for one in plan.layers)


def peak_bytes(plan: Plan) -> int:
    """Most bytes alive inside one layer's attention."""
    return max(one.peak_bytes for one in plan.layers)


def _attention(plan: Plan) -> dict[str, list[int]]:
    """Names of attentions as the recipe writes them, with their layers."""
    found: dict[str, list[int]] = {}
    for layer in plan.layers:
        found.setdefault(layer.written, []).append(layer.layer)
    return found


def _attention_text(found: Mapping[str, list[int]]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{layer_list(layers)}: {name}" for name, layers in found.items())


def starts(plan: Plan) -> dict[str, list[int]]:
    """How the designs of a plan behave fresh on pretrained weights, with their layers."""
    found: dict[str, list[int]] = {}
    for layer in plan.layers:
        found.setdefault(layer.start, []).append(layer.layer)
    return found


FIGURES: tuple[Figure, ...] = (
    Figure("backbone", lambda p: p.resolved.backbone.name, better=None),
    Figure("grid", lambda p: list(p.grid), lambda v: "×".join(map(str, v)), None),
    Figure("tokens", lambda p: p.grid.tokens, units.count, None),
    Figure("attention", _attention, _attention_text, None),
    Figure("start", starts, _attention_text, None),
    Figure("visited share", visited_share, units.percent),
    Figure("attention FLOPs", lambda p: p.totals.attention_flops, units.flops),
    Figure("forward FLOPs", lambda p: p.totals.flops, units.flops),
    Figure("attention speedup", lambda p: p.totals.attention_speedup, units.ratio, "high"),
    Figure("parameters", lambda p: p.totals.parameters, units.params, None),
    Figure("extra parameters", lambda p: p.totals.extra_parameters, units.params),
    Figure("weights", lambda p: p.totals.weight_bytes, units.gib),
    Figure("peak in one attention", peak_bytes, units.gib),
    Figure("activations, infer", lambda p: p.totals.activation_bytes.infer, units.gib),
    Figure("activations, train", lambda p: p.totals.activation_bytes.train, units.gib),
    Figure("… checkpointed", lambda p: p.totals.activation_bytes.train_checkpointed, units.gib),
    Figure("clip forwards", lambda p: p.clip.forwards, units.count, None),
    Figure("clip FLOPs", lambda p: p.clip.flops, units.flops),
    Figure("smallest GPU, infer", lambda p: smallest(p, "infer"), lambda v: v or "none", None),
    Figure("… train", lambda p: smallest(p, "train"), lambda v: v or "none", None),
    Figure("… train checkpointed", lambda p: smallest(p, "train_checkpointed"), lambda v: v or "none", None),
)


def smallest(plan: Plan, mode: str) -> str | None:
    """The GPU with the least memory that holds `mode`, None where none does."""
    return next((fit.gpu for fit in plan.fits if getattr(fit, mode)), None)


def rows(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """One mapping per plan: name, hash, every figure with its raw value, coverage, seconds and fits per GPU."""
    found = []
    for one in compared:
        row: dict[str, Any] = {"name": one.plan.name, "hash": one.plan.hash}
        for figure in FIGURES:
            row[figure.name] = figure.value(one.plan)
        row["coverage"] = one.coverage.data()
        row["seconds"] = [seconds.data() for seconds in one.plan.seconds]
        row["fits"] = [fit.data() for fit in one.plan.fits]
        found.append(row)
    return found


def table(compared: Sequence[Compared]) -> Table:
    """A rich table: figures down, plans across; the better values of a row are bold."""
    from rich.markup import escape
    from rich.table import Table

    plans = [one.plan for one in compared]
    made = Table(title=None, header_style="bold", pad_edge=False, box=None, show_edge=False)
    made.add_column("")
    for one in compared:
        made.add_column(escape(one.name), justify="right", overflow="fold")
    for figure in FIGURES:
        values = [figure.value(plan) for plan in plans]
        made.add_row(figure.name, *_marked(values, figure.text, figure.better))
        if figure.name == "visited share":
            made.add_row("coverage, layers", *(one.coverage.short() for one in compared))
    for name in GPUS_SHOWN:
        seconds = [next((one for one in plan.seconds if one.gpu == name), None) for plan in plans]
        if all(one is None for one in seconds):
            continue
        for label, attribute in (("forward", "forward"), ("clip", "clip")):
            times = [None if one is None else getattr(one, attribute) for one in seconds]
            if any(value is not None for value in times):
                made.add_row(f"{label} on {name}", *_marked(times, _time, "low"))
    return made


def _time(value: float | None) -> str:
    return "–" if value is None else units.duration(value)


def _marked(values: Sequence[Any], text: Callable[[Any], str], better: str | None) -> list[str]:
    from rich.markup import escape

    drawn = [escape(text(value)) for value in values]
    known = [value for value in values if isinstance(value, (int, float))]
    if better is None or len(set(known)) < 2:
        return drawn
    best = min(known) if better == "low" else max(known)
    return [f"[bold]{one}[/bold]" if value == best else one for one, value in zip(drawn, values, strict=True)]


def note(compared: Sequence[Compared]) -> str:
    """How coverage was found, plan by plan, and what the times of `table` assume, one line per GPU shown."""
    lines = [f"{one.name}: {one.coverage.text()}" for one in compared]
    for name in GPUS_SHOWN:
        found = {row.assumed for one in compared for row in one.plan.seconds if row.gpu == name}
        lines += [f"{name}: assumed {assumed}" for assumed in sorted(found)]
    return "\n".join(lines)


def text(compared: Sequence[Compared]) -> str:
    """The comparison for stdout: colours only on a terminal and without NO_COLOR, never cut when piped."""
    import sys

    from rich.console import Console
    from rich.text import Text

    width = None if sys.stdout.isatty() else max(100, 24 + 30 * len(compared))
    console = Console(file=sys.stdout, width=width, highlight=False)
    # written by the caller: rich would end the program where nobody reads any more
    with console.capture() as captured:
        console.print(table(compared))
        console.print(Text("\n" + note(compared)), style="dim", end="")
    return captured.get()
