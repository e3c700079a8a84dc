"""Running the program: in this process where that says as much, in a process of its own where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ultrazoo.cli import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """Exit code and what was written."""

    code: int
    out: str
    err: str


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Run in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    return Ran(code, written.out, written.err)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with the package importable, one thread, and nothing that changes how output looks."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}


def start(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, **options: object
) -> subprocess.Popen[str]:
    """Start ``python -m ultrazoo`` with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "ultrazoo", *map(str, arguments)],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def apart(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ran:
    """Run in a process of its own, to the end."""
    process = start(*arguments, cwd=cwd, env=env)
    out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out, err)
