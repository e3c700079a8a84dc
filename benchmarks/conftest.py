"""Options of the suite, and the rows it writes after all tests ran.

A test records a row only after its correctness gate; a figure that misses its target is written as such and fails the run. The
rates of sparse attentions (`test_zoo_rates`) alone are only written: a neighbour on the machine changes them.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.rows import RESULTS, Row, store

THREADS = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ultrazoo benchmarks")
    group.addoption("--results", default=str(RESULTS), help="directory of the result files")
    group.addoption("--no-results", action="store_true", help="measure and check, write nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


_ROWS: pytest.StashKey[dict[tuple[str, str], list[Row]]] = pytest.StashKey()
"""Rows by the name of their result file and the test's id."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Two threads, whatever the machine has: rates are compared with a matmul on the same two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(request: pytest.FixtureRequest) -> str:
    """The command that repeats this measurement."""
    return f"make bench BENCH={shlex.quote(request.node.nodeid)}"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Keep a row of this test. To be called after the gate and before the target is asserted.

    A test module names its result file as `RESULTS_NAME`; without it rows go to ``cpu``.
    """
    name = getattr(request.module, "RESULTS_NAME", "cpu")

    def keep(row: Row) -> None:
        request.config.stash[_ROWS].setdefault((name, request.node.nodeid), []).append(row)

    return keep


def pytest_sessionfinish(session: pytest.Session) -> None:
    files: dict[str, list[Row]] = {}
    for (name, _), kept in session.config.stash[_ROWS].items():
        files.setdefault(name, []).extend(kept)
    if not session.config.getoption("--no-results"):
        for name, rows in files.items():
            store(rows, Path(session.config.getoption("--results")), name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for kept in config.stash[_ROWS].values():
        for row in kept:
            numbers = ", ".join(f"{key} {value}" for key, value in row.numbers.items())
            verdict = "" if row.met is None else f"   target {row.target}: {'met' if row.met else 'NOT MET'}"
            terminalreporter.write_line(f"{row.case} [{row.dtype}]   {numbers}{verdict}")


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of a measured child process: two threads, our interpreter's programs first on PATH."""
    programs = str(Path(sys.executable).parent)
    return os.environ | {"OMP_NUM_THREADS": str(THREADS), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
