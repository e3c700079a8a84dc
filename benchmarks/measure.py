"""Measuring: interleaved timings in one process, and the wall time and anonymous memory of a child process.

Anonymous memory (RssAnon) is what the process itself allocated; memory-mapped files, which the kernel can drop, are left out.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S = 0.02
KEPT_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, in pieces of up to 32 MiB, as torch's allocator does on a GPU: without it every
    call pays for fresh pages, or does not, as chance has it. False where the C library has no such setting.

    The environment does the same from outside: MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # M_MMAP_THRESHOLD (32 MiB is its largest), M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all([mallopt(-3, 1 << 25), mallopt(-1, KEPT_BYTES), mallopt(-2, 1 << 28)])


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.samples_s) - min(self.samples_s)) / self.median_s

    def __str__(self) -> str:
        return f"{self.median_s:.4g} s ±{50 * self.spread:.0f} %"


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time every call once per round, in turn, so that all see the same state of the machine."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                found[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(samples)) for name, samples in found.items()}


@dataclass
class Watched:
    """A finished child process. `peak_anon` is the most anonymous memory, in bytes, of the whole process tree at one
    moment; `peaks` the same for each single process, by its command line."""

    code: int
    wall_s: float
    peak_anon: int
    output: str
    peaks: dict[str, int] = field(default_factory=dict)

    def peak_of(self, words: str) -> int:
        """Peak of the largest single process whose command line contains `words`."""
        return max((value for line, value in self.peaks.items() if words in line), default=0)


def watch(command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 1800) -> Watched:
    """Run a command to its end and sample its memory every 20 ms. Raises TimeoutError, after ending it."""
    start = time.perf_counter()
    peak, peaks = 0, {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink:
        child = subprocess.Popen(command, cwd=cwd, env=env, stdout=sink, stderr=subprocess.STDOUT)
        while child.poll() is None:
            total = 0
            for pid in _tree(child.pid):
                anon, line = _anon(pid), _line(pid)
                total += anon
                if line:
                    peaks[line] = max(peaks.get(line, 0), anon)
            peak = max(peak, total)
            if time.perf_counter() - start > timeout_s:
                child.kill()
                child.wait()
                raise TimeoutError(f"{' '.join(command)} ran longer than {timeout_s} s")
            time.sleep(SAMPLE_S)
        wall = time.perf_counter() - start
        sink.seek(0)
        return Watched(child.returncode, wall, peak, sink.read(), peaks)


def _tree(root: int) -> list[int]:
    """The process and its descendants."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                queue += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            # it ended while we looked
            pass
    return found


def _anon(pid: int) -> int:
    try:
        match = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
