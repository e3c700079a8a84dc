"""A bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, the name of what was just done)."""


@contextmanager
def bar(title: str) -> Iterator[Advance | None]:
    """Show progress in bytes on stderr while the block runs; gives None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=None)

        def advance(done: int, total: int, name: str) -> None:
            shown.update(task, completed=done, total=total, description=f"{title} {name[-32:]:<32}")

        yield advance
