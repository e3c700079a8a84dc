"""One measured row: what was measured, on what, from which source; and the files that rows are kept in.

A row is identified by case, device and dtype: a new measurement replaces the old one of the same identity. Rows of other
devices stay, and two rows are comparable only when device, case and dtype agree.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A measurement. `gate` says which correctness check passed before, and its figure; `numbers` carry units in their
    names; `target` is the figure asked for, in words, and `met` whether it holds (None where there is none)."""

    case: str
    attention: str
    dtype: str
    gate: str
    numbers: dict[str, float | int | str]
    command: str
    target: str = ""
    met: bool | None = None
    kernel: str = ""
    recipe_hash: str = ""
    device: str = field(default_factory=lambda: device())
    commit: str = field(default_factory=lambda: commit())
    versions: str = field(default_factory=lambda: versions())

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case, self.device, self.dtype


def device() -> str:
    """The processor by name, with the cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1].strip() if found else name
    except OSError:
        # not Linux: the architecture has to do
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """Short hash of the checkout, with ``+`` when the measured sources differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "ultrazoo", "recipes"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def versions() -> str:
    from importlib import metadata

    return f"python {platform.python_version()}, torch {metadata.version('torch')}"


def store(rows: list[Row], directory: Path = RESULTS, name: str = "cpu") -> None:
    """Merge rows into ``<name>.jsonl`` and write the same as a table, ``<name>.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.jsonl"
    kept: dict[tuple[str, str, str], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            old = json.loads(line)
            kept[(old["case"], old["device"], old["dtype"])] = old
    for row in rows:
        kept[row.key] = asdict(row)
    ordered = [kept[key] for key in sorted(kept)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered), encoding="utf-8")
    (directory / f"{name}.md").write_text(table(ordered, name), encoding="utf-8")


def table(rows: list[dict[str, Any]], name: str) -> str:
    """Rows for a reader: one table per device."""
    lines = [
        f"# Results: {name}",
        "",
        f"Written by the commands below from `{name}.jsonl`; see `README.md` for what is measured.",
    ]
    for where in sorted({row["device"] for row in rows}):
        lines += [
            "",
            f"## {where}",
            "",
            "| case | dtype | numbers | target | gate | source |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in (row for row in rows if row["device"] == where):
            numbers = ", ".join(f"{key} {value}" for key, value in row["numbers"].items())
            verdict = "" if row["met"] is None else (" — met" if row["met"] else " — **not met**")
            source = ", ".join(
                part for part in (row["commit"], row["versions"], row["kernel"], row["recipe_hash"][:12]) if part
            )
            cells = [row["case"], row["dtype"], numbers, row["target"] + verdict, row["gate"], source]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        commands = sorted({row["command"] for row in rows if row["device"] == where})
        lines += ["", "```bash", *commands, "```"]
    return "\n".join(lines) + "\n"
