"""Builds that are interrupted or killed half way, for real: a recipe slow by its size, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import TINY
from tests.cli.program import apart, environment, here, start

SLOW = (
    TINY.replace("name: tiny", "name: slow")
    .replace("layers: 3, dim: 48", "layers: 12, dim: 1024")
    .replace("rank: 4", "rank: 64")
)


@pytest.fixture
def slow(place: Path) -> Path:
    """A recipe of a quarter of a gigabyte beside the tiny one."""
    (place / "slow.yaml").write_text(SLOW)
    return place


def hidden(place: Path) -> list[Path]:
    """Work directories of builds in or below `place`."""
    return [path for path in place.rglob(".*") if path.is_dir()]


def half_way(process: subprocess.Popen[str], place: Path) -> None:
    """Stop the process (for the time being) when some of the weights are in its work directory."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        if sum(size(path) for work in hidden(place) for path in work.rglob("*.safetensors")) > 1 << 20:
            process.send_signal(signal.SIGSTOP)
            return
        time.sleep(0.01)
    raise AssertionError("the build did not start to write")


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """Ctrl-C, and what the process says until its end."""
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    return process.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupt_leaves_nothing(slow, number):
    process = start("build", "slow.yaml", cwd=slow)
    half_way(process, slow)
    out, err = interrupt(process, number)
    assert process.returncode == 130
    assert err.rstrip().endswith("interrupted")
    assert "Traceback" not in err
    assert out == ""
    # not even the directory `outputs`, which this build had made
    assert {path.name for path in slow.iterdir()} == {"slow.yaml", "tiny.yaml"}


def test_interrupt_keeps_what_force_would_replace(capsys, slow):
    assert here(capsys, "build", "tiny.yaml", "-o", "d").code == 0
    before = {path.name: path.read_bytes() for path in (slow / "d").iterdir()}
    process = start("build", "slow.yaml", "-o", "d", "--force", cwd=slow)
    half_way(process, slow)
    interrupt(process)
    assert process.returncode == 130
    assert {path.name: path.read_bytes() for path in (slow / "d").iterdir()} == before
    assert hidden(slow) == []


def test_a_killed_build_is_cleaned_by_the_next(slow):
    process = start("build", "slow.yaml", cwd=slow)
    half_way(process, slow)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    # what was killed cannot tidy up: a hidden work directory stays, and no half of a result
    assert len(hidden(slow)) == 1
    assert not (slow / "outputs" / "slow").exists()
    ran = apart("build", "slow.yaml", "backbone.layers=2", cwd=slow)
    assert ran.code == 0, ran.err
    assert hidden(slow) == []
    assert [path.name for path in (slow / "outputs").iterdir()] == ["slow"]


def test_a_running_build_is_left_alone_by_another(slow):
    first = start("build", "slow.yaml", cwd=slow)
    half_way(first, slow)
    ran = apart("build", "slow.yaml", "backbone.layers=1", cwd=slow)
    assert ran.code == 0, ran.err
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=120)
    # the second was quicker; the first must not replace its result without being told to
    assert first.returncode == 2, (out, err)
    assert "made by another process" in err
    assert hidden(slow) == []


def test_interrupt_while_torch_is_imported(place):
    process = start("plan", "tiny.yaml", cwd=place)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # quicker machines may be done by then; interrupted inside a C extension's import, Python leaves by the signal itself,
    # which a shell shows as 130 too
    assert process.returncode in (0, 130, -signal.SIGINT), err
    assert "Traceback" not in err


def test_an_interrupt_that_a_library_lost_is_130_too(tmp_path):
    """numpy, interrupted while torch imports it, is tried again by others, who then fail: a user pressed Ctrl-C, no more."""
    (tmp_path / "inside.py").write_text(
        "import contextlib, signal, sys\nfrom ultrazoo import cli\n"
        "def lost(arguments):\n"
        "    with cli._terminable():\n"
        "        if arguments:\n"
        "            with contextlib.suppress(KeyboardInterrupt):\n"
        "                signal.raise_signal(signal.SIGINT)\n"
        "        raise ImportError('cannot load module more than once per process')\n"
        "cli._run = lost\nsys.exit(cli.main(sys.argv[1:]))\n"
    )

    def run(*arguments):
        program = [sys.executable, "-m", "inside", *arguments]
        return subprocess.run(program, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)

    done = run("interrupted")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("internal error: ImportError")


def test_an_interrupt_inside_generated_code_is_130_too(tmp_path):
    """An interpreter remembers such an interrupt, caught or not."""
    (tmp_path / "inside.py").write_text(
        "import sys\nfrom ultrazoo import cli\n"
        "cli._run = lambda arguments: exec('raise KeyboardInterrupt')\nsys.exit(cli.main([]))\n"
    )
    program = [sys.executable, "-m", "inside"]
    done = subprocess.run(program, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
