"""What the command line writes: results on stdout, everything else on stderr, colour only on a terminal.

Imports neither rich nor torch, so that `list` and `--help` stay quick.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_PLAIN_WIDTH = 10_000
"""Columns of a table that no terminal shows: lines are for other programs there, so nothing is cut."""


def coloured(stream: TextIO) -> bool:
    """Whether colour codes may be written to `stream`: a terminal, and neither NO_COLOR nor TERM=dumb is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, *names: str, stream: TextIO | None = None) -> str:
    """`text` in the named styles where `stream` (stdout) takes colour, else unchanged."""
    if not names or not coloured(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[name] for name in names)}m{text}\x1b[0m"


def width() -> int:
    """Columns of the terminal behind stdout; practically unlimited where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PLAIN_WIDTH


class ReaderGone(Exception):
    """Whoever read our stdout has closed it. Not an OSError: the parser takes those for failures."""


def echo(text: str = "") -> None:
    """One result on stdout; raises ReaderGone when nobody reads any more."""
    try:
        sys.stdout.write(text + "\n")
    except BrokenPipeError:
        raise ReaderGone from None


def note(text: str) -> None:
    """One line of log on stderr, never a result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def emit(data: Any) -> None:
    """A result as JSON on stdout. Keys keep their order; NaN and infinity are not JSON and raise ValueError."""
    echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (str, os.PathLike)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def table(rows: Iterable[Sequence[str]], headers: Sequence[str] = (), indent: str = "", right: str = "") -> str:
    """Aligned columns. On a terminal the last column is cut to fit; `right` holds an ``r`` per right-aligned column."""
    body = [[str(cell) for cell in row] for row in rows]
    everything = [list(headers), *body] if headers else body
    if not everything:
        return ""
    columns = max(len(row) for row in everything)
    widths = [max((len(row[c]) for row in everything if c < len(row)), default=0) for c in range(columns)]
    limit = width()
    lines = []
    for number, row in enumerate(everything):
        cells = []
        for column, cell in enumerate(row):
            if column == len(row) - 1 and not _rightward(right, column):
                cells.append(cell)
            else:
                cells.append(cell.rjust(widths[column]) if _rightward(right, column) else cell.ljust(widths[column]))
        line = (indent + "  ".join(cells)).rstrip()
        if len(line) > limit:
            line = line[: limit - 1] + "…"
        lines.append(style(line, "bold") if headers and number == 0 else line)
    return "\n".join(lines)


def _rightward(right: str, column: int) -> bool:
    return column < len(right) and right[column] == "r"


def size(number: float) -> str:
    """Bytes for people, in binary units: ``2.65 GiB``."""
    for factor, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}" if number / factor < 999.5 else f"{number / factor:.0f} {prefix}"
    return f"{int(number)} B"
