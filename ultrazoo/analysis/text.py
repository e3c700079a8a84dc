"""Views of a query and block maps drawn with characters, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from ..cost.units import count, percent
from .blocks import BlockMap
from .influence import ALL, View, Views

SHADES = " ░▒▓█"
PLAIN = " .:+#"
QUERY = "◆"
PLAIN_QUERY = "Q"
_LEGEND = "share of a cell's tokens seen, all frames"
_BLOCK_LEGEND = "down: blocks of queries, across: blocks of keys, both in raster order; share of pairs seen"


def render(groups: Sequence[Views], *, width: int = 100, unicode: bool = True) -> str:
    """Every group of layers as maps over (H, W) and a strip over T; no line is longer than `width`."""
    shades = SHADES if unicode else PLAIN
    query = QUERY if unicode else PLAIN_QUERY
    lines: list[str] = []
    for group in groups:
        t, y, x = group.query
        lines.append(f"{group.title}: {group.attention}; query t={t} y={y} x={x}; starts {group.start}")
        if group.bound != "exact":
            inside = "what the data select lies inside" if group.selects else "some of it may weigh nothing"
            lines.append(f"  ({group.bound}: {inside})")
        shown = group.views if len(group.views) != 2 else group.views[-1:]
        lines += _side_by_side([_block(view, group.query, shades, query, width, len(shown)) for view in shown], width)
        lines.append("")
    lines.append(f"{_LEGEND}: {_steps(shades)}; {query} the query; T: one cell per frame")
    return "\n".join(line.rstrip() for line in lines)


def _steps(shades: str) -> str:
    names = ("none", "< 1/3", "< 2/3", "< all", "all")
    return "  ".join(f"{shade!r} {name}" for shade, name in zip(shades, names, strict=True))


def render_blocks(
    groups: Sequence[Views], maps: Sequence[Mapping[str, BlockMap]], *, width: int = 100, unicode: bool = True
) -> str:
    """The block maps of every group of layers, side by side; no line of a map is longer than `width`."""
    shades = SHADES if unicode else PLAIN
    lines: list[str] = []
    for group, named in zip(groups, maps, strict=True):
        lines.append(f"{group.title}: {group.attention}; {named[ALL].title()}")
        # one branch alone is all there is
        shown = named if len(named) != 2 else {ALL: named[ALL]}
        lines += _side_by_side([_block_map(name, one, shades, width, len(shown)) for name, one in shown.items()], width)
        lines.append("")
    some = any(not one.exact for named in maps for one in named.values())
    lines.append(f"{_BLOCK_LEGEND}{', of the queries looked at' if some else ''}: {_steps(shades)}")
    return "\n".join(line.rstrip() for line in lines)


def _block_map(name: str, one: BlockMap, shades: str, width: int, columns: int) -> list[str]:
    room = max(12, min((width - 4 * columns) // min(columns, 4), 48))
    cols = min(room, one.blocks)
    # a character is about twice as tall as wide
    rows = max(1, min(one.blocks, round(cols / 2)))
    edge = "-" * cols
    drawn = ["".join(_shade(value, shades) for value in row) for row in cells(one.share, rows, cols)]
    caption = [name, one.seen_text]
    if not one.exact:
        caption.append(f"from {count(one.looked_at)} of {count(one.of)} queries per block")
    return [*caption, f"+{edge}+", *(f"|{row}|" for row in drawn), f"+{edge}+"]


def folded(text: str, width: int) -> str:
    """Sentences broken at `width`, what is indented staying so."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False) or [""]
    return "\n".join(lines)


def _block(view: View, query: tuple[int, int, int], shades: str, mark: str, width: int, columns: int) -> list[str]:
    """One view: a caption, the map, the strip over frames."""
    frames, h, w = view.seen.shape
    # a character is about twice as tall as wide
    room = max(12, min((width - 2 * columns) // min(columns, 4), 48))
    cols = min(room, w)
    rows = max(1, min(h, round(cols * h / w / 2)))
    space = cells(view.seen.mean(axis=0), rows, cols)
    drawn = [[_shade(value, shades) for value in row] for row in space]
    drawn[_cell(query[1], h, rows)][_cell(query[2], w, cols)] = mark
    strip_cols = min(frames, room - 3)
    strip = "".join(_shade(value, shades) for value in cells(view.per_frame[None], 1, strip_cols)[0])
    edge = "-" * cols
    caption = [view.name, f"{count(view.tokens)} tokens, {percent(view.share)}"]
    return [*caption, f"+{edge}+", *(f"|{''.join(row)}|" for row in drawn), f"+{edge}+", f"T[{strip}]"]


def _shade(value: float, shades: str) -> str:
    if value <= 0:
        return shades[0]
    if value >= 1:
        return shades[-1]
    return shades[1 + min(2, int(value * 3))]


def _edges(size: int, parts: int) -> np.ndarray:
    return np.arange(parts + 1) * size // parts


def _cell(position: int, size: int, parts: int) -> int:
    return int(np.searchsorted(_edges(size, parts), position, side="right")) - 1


def cells(values: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Means of a (H, W) map over `rows` x `cols` nearly equal cells; needs rows ≤ H and cols ≤ W."""
    h, w = values.shape
    down, across = _edges(h, rows), _edges(w, cols)
    sums = np.add.reduceat(np.add.reduceat(values, down[:-1], axis=0), across[:-1], axis=1)
    means: np.ndarray = sums / (np.diff(down)[:, None] * np.diff(across)[None])
    return means


def _side_by_side(blocks: Sequence[list[str]], width: int) -> list[str]:
    """Blocks in as many columns as fit `width`, rows of blocks under each other."""
    lines: list[str] = []
    pending = list(blocks)
    while pending:
        row = [pending.pop(0)]
        used = max(map(len, row[0]))
        while pending and used + 2 + max(map(len, pending[0])) <= width:
            row.append(pending.pop(0))
            used += 2 + max(map(len, row[-1]))
        widths = [max(map(len, block)) for block in row]
        height = max(map(len, row))
        for i in range(height):
            parts = [block[i] if i < len(block) else "" for block in row]
            lines.append("  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True)))
    return lines
