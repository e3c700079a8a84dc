"""Pictures of block maps, queries down and keys across, and small pictures of a design for lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .blocks import BlockMap
from .influence import ALL, View, Views
from .pictures import ELSEWHERE, FAINT, HERE, MARK, MOST_GROUPS, STYLE

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
        some = any(not one.exact for _, named in shown for one in named.values())
        legend = "down: blocks of queries; across: blocks of keys; dark: all pairs seen, grey: none"
        legend += ", of the queries looked at" if some else ""
        figure.text(0.12 / wide, 1 - 0.48 / tall, legend, fontsize=8, va="center")
        for row, (group, named) in enumerate(shown):
            top = tall - head - row_tall * row
            figure.text(0.12 / wide, (top - 0.1) / tall, notes[row], fontsize=9, weight="bold", va="center")
            for column, (name, one) in enumerate(named.items()):
                low = (top - 0.5 - _SIDE) / tall
                box = ((_LEFT + (_SIDE + _GAP) * column) / wide, low, _SIDE / wide, _SIDE / tall)
                axes = figure.add_axes(box)
                _map(axes, one)
                axes.set_title(f"{name}: {one.seen_text}", loc="left", fontsize=8, pad=4)
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


_MOST_FRAMES, _MOST_ROWS = 5, 6


def thumbnail(groups: Sequence[Views], maps: Sequence[Mapping[str, BlockMap]]) -> Figure:
    """A small picture of a design: per group of layers and branch, the frames with what one query may depend on, and the
    block map.

    At most 6 rows and 5 frames are drawn, frames evenly chosen and with the query's own.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [
        (group, view, named.get(view.name, named[ALL]), view.name in named)
        for group, named in zip(groups, maps, strict=True)
        for view in (group.views[:-1] if len(group.views) > 2 else group.views[-1:])
    ][:_MOST_ROWS]
    frames, h, w = shown[0][1].seen.shape
    chosen = _frames(frames, shown[0][0].query[0])
    tall_one, head = 1.0, 0.34
    wide_one = tall_one * min(max(w / h, 0.6), 2.0)
    wide = 0.1 + (wide_one + 0.08) * len(chosen) + 0.25 + tall_one + 0.1
    tall = (tall_one + head) * len(shown) + 0.08
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(wide, tall), dpi=110)
        for row, (group, view, blocks, named) in enumerate(shown):
            low = (tall - (tall_one + head) * (row + 1)) / tall
            name = group.title if view.name == ALL else f"{group.title}: {view.name}"
            for column, frame in enumerate(chosen):
                left = (0.1 + (wide_one + 0.08) * column) / wide
                axes = figure.add_axes((left, low, wide_one / wide, tall_one / tall))
                _frame(axes, view, frame, group.query)
                axes.set_title(
                    f"{name}, t = {frame}" if column == 0 else f"t = {frame}", loc="left", fontsize=6.5, pad=3
                )
            left = (0.1 + (wide_one + 0.08) * len(chosen) + 0.25) / wide
            axes = figure.add_axes((left, low, tall_one / wide, tall_one / tall))
            _map(axes, blocks)
            # heads have no maps of their own
            axes.set_title("blocks" if named else "blocks, all heads", loc="left", fontsize=6.5, pad=3)
    return figure


def _frames(frames: int, own: int) -> list[int]:
    picked = {int(place) for place in np.linspace(0, frames - 1, min(frames, _MOST_FRAMES)).round()}
    if own not in picked:
        picked.discard(min(picked, key=lambda frame: abs(frame - own)))
        picked.add(own)
    return sorted(picked)


def _frame(axes: Axes, view: View, frame: int, query: tuple[int, int, int]) -> None:
    from matplotlib.colors import ListedColormap

    seen = view.seen[frame].astype(int)
    axes.imshow(seen, cmap=ListedColormap([FAINT, HERE]), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    t, y, x = query
    if frame == t:
        axes.plot([x], [y], marker="+", color=MARK, markersize=6, markeredgewidth=1.6)
    axes.set_xticks([])
    axes.set_yticks([])
