"""Exports that are interrupted half way: nothing is left behind, neither files nor processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.program import start
from tests.export.conftest import IMAGE

COMPILER = """\
#!/bin/sh
# tells who it is, and compiles until it is stopped
case "$1" in --version|-v|-dumpversion) exec g++ "$@" ;; esac
echo $$ > "$STARTED"
exec sleep 300
"""


def obedient() -> None:
    """A shell that runs tests in the background has interrupts ignored, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    until = time.monotonic() + 200
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "the export did not get so far"
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, (out, err)
    assert err.rstrip().endswith("interrupted")
    assert "Traceback" not in err
    assert out == ""
    return out, err


def lives(process: int) -> bool:
    """Does a process run (one that is dead and that nobody has asked for does not)?"""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_interrupt_in_the_middle_of_a_trace(tmp_path):
    (tmp_path / "image.yaml").write_text(json.dumps(IMAGE))
    line = ("export", "image.yaml", "--to", "pt2", "-o", "below/out")
    process = start(*line, cwd=tmp_path, preexec_fn=obedient)
    started(process, lambda: any(tmp_path.glob("below/.out.*/new")))
    process.send_signal(signal.SIGINT)
    ended(process)
    assert {one.name for one in tmp_path.iterdir()} == {"image.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupt_in_the_middle_of_a_compilation(tmp_path, number):
    (tmp_path / "image.yaml").write_text(json.dumps(IMAGE))
    compiler, mark = tmp_path / "g++", tmp_path / "started"
    compiler.write_text(COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    env = {"CXX": str(compiler), "STARTED": str(mark), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    line = ("export", "image.yaml", "--to", "aoti", "-o", "below/out")
    process = start(*line, cwd=tmp_path, env=env, preexec_fn=obedient)
    started(process, lambda: mark.exists() and mark.read_text().strip() != "")
    compiling = int(mark.read_text())
    assert lives(compiling)
    os.kill(process.pid, number)
    ended(process)
    assert not lives(compiling)
    assert not (tmp_path / "below").exists()
