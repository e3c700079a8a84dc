"""Pictures of block maps: queries down, keys across, one map per branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..cost.units import percent
from .blocks import BlockMap
from .influence import ALL, Views
from .pictures import ELSEWHERE, FAINT, HERE, MOST_GROUPS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDE = 2.3
_LEFT = 0.45
_GAP = 0.35


def block_figure(groups: Sequence[Views], maps: Sequence[Mapping[str, BlockMap]], title: str = "") -> Figure:
    """One row per group of layers, one column per branch. Dark: every pair of two blocks is seen; grey: none.

    Lines stand between spans of frames. At most 8 groups are drawn, and the heading says how many there are.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = list(zip(groups, maps, strict=True))[:MOST_GROUPS]
    # one branch alone is all there is
    shown = [(group, dict(named) if len(named) != 2 else {ALL: named[ALL]}) for group, named in rows]
    columns = max(len(named) for _, named in shown)
    left_out = f" ({len(shown)} of {len(groups)} patterns drawn)" if len(groups) > len(shown) else ""
    heading = f"{title + ': ' if title else ''}which blocks of keys each block of queries sees{left_out}"
    notes = [f"{group.title}: {group.attention}; {named[ALL].title()}" for group, named in shown]
    wide = max(_LEFT + (_SIDE + _GAP) * columns, 0.1 * len(heading) + 0.3, 0.075 * max(map(len, notes)) + 0.3)
    row_tall = _SIDE + 0.85
    head = 0.75
    tall = head + row_tall * len(shown)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(wide, tall), dpi=120)
        figure.text(0.12 / wide, 1 - 0.22 / tall, heading, weight="bold", fontsize=11, va="center")
        legend = "down: blocks of queries; across: blocks of keys; dark: all pairs seen, grey: none"
        figure.text(0.12 / wide, 1 - 0.48 / tall, legend, fontsize=8, va="center")
        for row, (group, named) in enumerate(shown):
            top = tall - head - row_tall * row
            figure.text(0.12 / wide, (top - 0.1) / tall, notes[row], fontsize=9, weight="bold", va="center")
            for column, (name, one) in enumerate(named.items()):
                low = (top - 0.5 - _SIDE) / tall
                box = ((_LEFT + (_SIDE + _GAP) * column) / wide, low, _SIDE / wide, _SIDE / tall)
                axes = figure.add_axes(box)
                _map(axes, one)
                axes.set_title(f"{name}: {percent(one.seen)} of block pairs", loc="left", fontsize=8, pad=4)
                if column == 0:
                    axes.set_ylabel(f"queries, {group.title}", fontsize=7)
    return figure


def _map(axes: Axes, one: BlockMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    fade = LinearSegmentedColormap.from_list("share", [FAINT, ELSEWHERE, HERE])
    # a square root, and a floor under what is not zero, keep a small share visible
    drawn = np.where(one.share > 0, np.maximum(np.sqrt(one.share), 0.25), 0)
    axes.imshow(drawn, cmap=fade, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    spans = one.counts[0]
    for span in range(1, spans):
        place = span * one.blocks / spans - 0.5
        axes.axhline(place, color="white", lw=0.6)
        axes.axvline(place, color="white", lw=0.6)
    axes.set_xticks([])
    axes.set_yticks([])
