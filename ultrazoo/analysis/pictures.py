"""Pictures of a plan: who can influence a query, and what each layer costs. matplotlib without a display.

Nothing here touches pyplot, so no figure outlives its caller and the caller's matplotlib settings stay as they are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cost.price import LayerPlan
from ..cost.units import count, flops, percent
from .influence import ALL, Views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
FAINT = "#e4e7eb"
ELSEWHERE = "#a9c9ee"
HERE = "#1d5fae"
MARK = "#e8590c"
PARTS = (("attention", "#1d5fae"), ("projections", "#7fb2e5"), ("other", "#c3cfd9"))

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # identifiers inside an SVG must not change from run to run
    "svg.hashsalt": "ultrazoo",
    "svg.fonttype": "none",
}
MOST_GROUPS = 8


def influence(groups: Sequence[Views], title: str = "") -> Figure:
    """One row per group of layers, one column per branch: the (H, W) plane and, under it, a strip over frames.

    Dark: seen in the query's own frame; light: seen in another frame only; the cross is the query. At most
    8 groups are drawn, and the title says how many there are.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = list(groups[:MOST_GROUPS])
    names = _columns(shown)
    frames, h, w = shown[0].whole.seen.shape
    tall = min(max(h / w, 0.4), 1.6)
    strip = 0.0 if frames == 1 else 0.16
    cell_w = 2.9
    cell_h = cell_w * tall + strip
    gap, head, foot = 0.75, 1.2, 0.15
    t, y, x = shown[0].query
    left_out = f" ({len(shown)} of {len(groups)} patterns drawn)" if len(groups) > len(shown) else ""
    heading = f"{title + ': ' if title else ''}who can influence token t={t}, y={y}, x={x}{left_out}"
    # the heading and the legend need room above a single column
    wide = max(cell_w * len(names) + 0.3, 0.1 * len(heading) + 0.3, 7.4)
    with mpl.rc_context(STYLE):
        tallest = head + cell_h * len(shown) + gap * (len(shown) - 1) + foot
        figure = Figure(figsize=(wide, tallest), dpi=_dpi(w / cell_w))
        height = figure.get_figheight()
        grid = GridSpec(
            len(shown),
            len(names),
            figure=figure,
            left=0.02,
            right=0.02 + cell_w * len(names) / wide,
            top=1 - head / height,
            bottom=foot / height,
            wspace=0.08,
            hspace=gap / cell_h,
        )
        for row, group in enumerate(shown):
            top = grid[row, 0].get_position(figure).y1
            figure.text(0.02, top + 0.36 / height, f"{group.title}: {group.attention}", weight="bold", va="center")
            # what has no branches starts at the left
            columns = {view.name: names.index(view.name) for view in group.views} if len(group.views) > 1 else {ALL: 0}
            for view in group.views:
                column = columns[view.name]
                if frames == 1:
                    plane = figure.add_subplot(grid[row, column])
                else:
                    inner = grid[row, column].subgridspec(2, 1, height_ratios=(cell_w * tall, strip), hspace=0.06)
                    plane = figure.add_subplot(inner[0])
                    _strip(figure.add_subplot(inner[1]), view.per_frame, group.query[0])
                _plane(plane, view.seen, group.query)
                plane.set_title(
                    f"{view.name}: {count(view.tokens)} tokens, {percent(view.share)}", loc="left", fontsize=8, pad=4
                )
        figure.text(0.02, 1 - 0.22 / height, heading, weight="bold", fontsize=11, va="center")
        legend: list[Any] = [Patch(color=HERE, label="seen in the query's frame")]
        if frames > 1:
            legend.append(Patch(color=ELSEWHERE, label="seen in other frames only"))
            legend.append(Patch(facecolor="white", edgecolor="#9aa5b1", label="strip: share seen of each frame"))
        legend.append(Line2D([], [], color=MARK, marker="+", markersize=8, markeredgewidth=2, ls="", label="the query"))
        figure.legend(
            handles=legend, loc="center left", bbox_to_anchor=(0.015, 1 - 0.45 / height), ncols=len(legend),
            frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.4,
        )  # fmt: skip
    return figure


def _dpi(tokens_per_inch: float) -> float:
    """At least two pixels per token, within reason: single tokens of a strided pattern stay visible."""
    return min(max(110.0, 2 * tokens_per_inch), 220.0)


def _columns(groups: Sequence[Views]) -> list[str]:
    """Branch names in order of first appearance, the whole attention last; it alone where nothing has branches."""
    names: list[str] = []
    for group in groups:
        names += [view.name for view in group.views if view.name not in names and view.name != ALL]
    return [*names, ALL]


def _plane(axes: Axes, seen: np.ndarray, query: tuple[int, int, int]) -> None:
    from matplotlib.colors import ListedColormap

    _, h, w = seen.shape
    values = np.where(seen[query[0]], 2, np.where(seen.any(axis=0), 1, 0))
    axes.imshow(
        _coarser(values),
        extent=(-0.5, w - 0.5, h - 0.5, -0.5),
        cmap=ListedColormap([FAINT, ELSEWHERE, HERE]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
        aspect="auto",
    )
    axes.plot([query[2]], [query[1]], marker="+", color=MARK, markersize=9, markeredgewidth=2)
    axes.set_xlim(-0.5, w - 0.5)
    axes.set_ylim(h - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _coarser(values: np.ndarray, most: int = 300) -> np.ndarray:
    """The largest value of every cell where a map has more rows or columns than a picture can show."""
    h, w = values.shape
    if h > most:
        values = np.maximum.reduceat(values, np.arange(most) * h // most, axis=0)
    if w > most:
        values = np.maximum.reduceat(values, np.arange(most) * w // most, axis=1)
    return values


def _strip(axes: Axes, shares: np.ndarray, frame: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    fade = LinearSegmentedColormap.from_list("share", [FAINT, ELSEWHERE, HERE])
    # a square root, and a floor under what is not zero, keep a small share visible
    drawn = np.where(shares > 0, np.maximum(np.sqrt(shares), 0.3), 0)
    axes.imshow(drawn[None], cmap=fade, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.plot([frame], [0], marker="+", color=MARK, markersize=6, markeredgewidth=1.6)
    axes.set_xticks([])
    axes.set_yticks([])


def layer_costs(layers: Sequence[LayerPlan], full: int | None = None, title: str = "") -> Figure:
    """FLOPs per layer as stacked bars; `full` (full attention's attention FLOPs in one layer) as a dashed line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    parts = np.array([[one.attention_flops, one.projection_flops, one.other_flops] for one in layers], dtype=float)
    top = parts.sum(axis=1).max()
    scale, unit = _unit(top)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.9), dpi=120)
        axes = figure.add_axes((0.08, 0.19, 0.90, 0.60))
        places = [one.layer for one in layers]
        base = np.zeros(len(layers))
        for column, (name, colour) in enumerate(PARTS):
            axes.bar(places, parts[:, column] / scale, bottom=base / scale, width=0.82, color=colour, label=name)
            base += parts[:, column]
        heading = title or "FLOPs of one forward, per layer"
        if full is not None and full > 1.02 * parts[:, 0].max():
            if full <= 4 * top:
                axes.axhline(full / scale, color=MARK, ls="--", lw=1.2, label=f"full attention alone: {flops(full)}")
            else:
                heading += f" (full attention alone: {flops(full)}, far above)"
        axes.set_title(heading, loc="left", fontsize=10, weight="bold", pad=24)
        axes.set_ylabel(unit)
        axes.set_xlabel("layer")
        axes.set_xlim(min(places) - 0.7, max(places) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4, frameon=False, fontsize=8, handlelength=1.2
        )
    return figure


def _unit(top: float) -> tuple[float, str]:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if top >= size:
            return size, unit
    return 1.0, "FLOP"


def image(figure: Figure, form: str = "png") -> bytes:
    """The figure as bytes, ``"png"`` or ``"svg"``, the same bytes every time."""
    import matplotlib as mpl

    metadata: dict[str, Any] = {"Date": None} if form == "svg" else {"Software": None}
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format=form, metadata=metadata)
    return stream.getvalue()
