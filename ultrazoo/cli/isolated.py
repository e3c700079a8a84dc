"""Importing plugins where they can do no harm: each in a process of its own, with a time limit.

Run as ``python -m ultrazoo.cli.isolated KIND NAME`` it is that process: it imports one plugin and prints one line of
JSON on the stdout it was given; whatever the plugin prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..registry import Entry

SECONDS = 60.0
WORKERS = 4


def checked(rows: Sequence[Entry], seconds: float = SECONDS) -> list[Entry]:
    """The same plugins with what their import showed as `status` (``ok`` or ``broken: <cause>``) and `problem`.

    Entries that metadata alone shows to be unusable keep their status and are not imported.
    """
    with ThreadPoolExecutor(min(WORKERS, max(1, os.cpu_count() or 1))) as pool:
        return list(pool.map(lambda row: row if row.problem else _check(row, seconds), rows))


def _check(row: Entry, seconds: float) -> Entry:
    # the child sees the same modules as this process, however this one was started
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ultrazoo.cli.isolated", row.kind, row.name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return _broken(row, f"import still not done after {seconds:g} s")
    except BaseException:
        # interrupted: nothing of ours may go on running
        _kill(process)
        raise
    finally:
        _kill(process)
    try:
        answer = json.loads(stdout)
    except ValueError:
        return _broken(row, _death(process.returncode, stderr))
    return replace(row, status="ok") if answer["ok"] else _broken(row, answer["cause"])


def _kill(process: subprocess.Popen[str]) -> None:
    """End the child and whatever it started, and reap it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # gone already, and nothing of its group is left
        pass
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _broken(row: Entry, why: str) -> Entry:
    why = " ".join(why.split())
    return replace(row, status=f"broken: {why}", problem=why)


def _death(code: int, stderr: str) -> str:
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    return f"the importing process was {how}" + (f" after: {last.strip()}" if last else "")


def _import(kind: str, name: str) -> dict[str, object]:
    from .. import registry
    from ..errors import RegistryError

    try:
        registry.find(kind, name)
    except RegistryError as error:
        inner = error.__cause__
        return {"ok": False, "cause": registry.cause(inner) if inner is not None else str(error)}
    except BaseException as error:  # anything at all that a plugin can raise
        return {"ok": False, "cause": registry.cause(error)}
    return {"ok": True}


def _child(arguments: Sequence[str]) -> None:
    kind, name = arguments
    # keep the answer's channel for us: a plugin may print at import
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(_import(kind, name), answer)
    answer.flush()
    # threads that the plugin left behind shall not keep this process
    os._exit(0)


if __name__ == "__main__":
    _child(sys.argv[1:])
