"""A probe as a picture: error against time and against visited pairs, with the front that nothing beats in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .pictures import ELSEWHERE, FAINT, HERE, INK, MARK, STYLE, image
from .probe import Probe, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (("relative_time", "time, full attention = 1"), ("share", "visited pairs, full attention = 1"))
FLOOR = 1e-3
"""Errors below it are drawn here: a design that is exact has no place on a scale of powers."""

WIDE = 8
"""Costs that differ by more than this factor are drawn on a scale of powers."""


def plot(probe: Probe, form: str = "png") -> bytes:
    """The picture as bytes, ``png`` or ``svg``."""
    return image(figure(probe), form)


def figure(probe: Probe) -> Figure:
    """Two panels, one dot per recipe that was measured at every item; the front is a line through darker dots."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in probe.rows if row.whole]
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(10.4, 4.6), dpi=120)
        made.text(
            0.02, 0.95, "Error against cost, on captured queries and keys", weight="bold", fontsize=11, va="center"
        )
        for at, (cost, label) in enumerate(PANELS):
            axes = made.add_axes((0.07 + 0.49 * at, 0.2, 0.40, 0.66))
            _panel(axes, rows, probe.front(cost), cost, label)
        made.text(0.02, 0.04, _foot(probe, rows), fontsize=7, va="center")
    return made


def _panel(axes: Axes, rows: list[Row], front: list[Row], cost: str, label: str) -> None:
    def place(row: Row) -> tuple[float, float]:
        return getattr(row, cost), max(row.error or 0.0, FLOOR)

    shown = [row for row in rows if getattr(row, cost) is not None]
    axes.plot(*zip(*map(place, front), strict=True), color=HERE, lw=1.2, zorder=1) if front else None
    for row in shown:
        x, y = place(row)
        axes.plot([x], [y], marker="o", markersize=6, color=HERE if row in front else ELSEWHERE, zorder=2)
        axes.annotate(row.name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=INK)
    axes.axvline(1.0, color=MARK, lw=1, ls="--", zorder=0)
    axes.set_yscale("log")
    costs = [1.0, *(getattr(row, cost) for row in shown)]
    if max(costs) > WIDE * min(costs) and min(costs) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.5, 2 * max(costs))
    else:
        axes.set_xlim(0, 1.15 * max(costs))
    axes.set_xlabel(label)
    axes.set_ylabel("error of the output (RMS ratio)")
    axes.grid(True, color=FAINT, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _foot(probe: Probe, rows: list[Row]) -> str:
    left = len(probe.rows) - len(rows)
    words = [f"{probe.dtype} on {probe.device}; dashed: full attention; line: no recipe beats these in both"]
    if left:
        words.append(f"{left} of {len(probe.rows)} recipes could not be replayed everywhere and are not drawn")
    if any(row.error is not None and row.error < FLOOR for row in rows):
        words.append(f"errors below {FLOOR:g} are drawn there")
    return "; ".join(words)
