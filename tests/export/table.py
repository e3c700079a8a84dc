"""The committed table of proofs: one line per case and target, written by `make proof`, read by `make test` and the docs."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLACE = Path(__file__).with_name("proofs.json")
Rows = dict[tuple[str, str], dict[str, Any]]


def read(place: Path = PLACE) -> Rows:
    """Rows by (case, target)."""
    if not place.exists():
        return {}
    return {(row["case"], row["target"]): row for row in json.loads(place.read_text())}


def write(rows: Rows, place: Path = PLACE) -> None:
    """Sorted, a row a line, so that a change of one proof is a change of one line; the file is whole at any time."""
    lines = [json.dumps(rows[key]) for key in sorted(rows)]
    part = place.with_name(f".{place.name}.{os.getpid()}")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    part.replace(place)


def keep(case: str, target: str, row: dict[str, Any] | None, place: Path = PLACE) -> None:
    """Put a row into the table, or take it out; several processes may do so at once."""
    with _alone(place):
        rows = read(place)
        rows.pop((case, target), None)
        if row is not None:
            rows[case, target] = {"case": case, "target": target, **row}
        write(rows, place)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    lock = Path(tempfile.gettempdir()) / f"{place.name}.{os.getuid()}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
