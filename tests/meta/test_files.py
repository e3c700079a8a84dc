"""What the tracked files may not hold: a machine's path, a download address, a file too long to read, a bare module."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 400

# written in pieces, so that this file does not hold what it looks for
PATHS = re.compile(
    r"(?<![\w.}/-])/(?:"
    + "|".join(["wo" + "rk/", "ho" + r"me/[a-z]", "ro" + "ot/", "Us" + "ers/[a-z]", "mn" + "t/[a-z]", "tm" + "p/[a-z]"])
    + ")"
)
ADDRESSES = re.compile("files" + r"\.pythonhosted\.org|--(?:extra-)?index-" + r"url|download\." + r"pytorch\.org")
BINARY = {".png", ".safetensors", ".pt", ".ckpt", ".gif", ".ico", ".woff2", ".npz"}


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout: what is tracked cannot be told")
    names = [name for name in done.stdout.split("\0") if name]
    return [ROOT / name for name in names if Path(name).suffix not in BINARY and (ROOT / name).is_file()]


def hits(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def test_no_tracked_file_holds_a_machines_path() -> None:
    assert hits(PATHS) == []


def test_no_tracked_file_holds_a_download_address() -> None:
    assert hits(ADDRESSES) == []


def test_the_patterns_match_what_they_are_for() -> None:
    for path in ("/wo" + "rk/main", "'/ho" + "me/ann/x'", "(/tm" + "p/abc)", "/ro" + "ot/.cache"):
        assert PATHS.search(path), path
    for harmless in ("network/work", "https://example.org/home/page", "docs/root/", "a /dev/null", "tests/tmp/x"):
        assert not PATHS.search(harmless), harmless


PYTHON = sorted((ROOT / "ultrazoo").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))


def test_files_can_be_read_at_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_modules_say_what_they_are() -> None:
    silent = []
    for path in PYTHON:
        text = path.read_text()
        empty = path.name == "__init__.py" and not text.strip()
        if not empty and not ast.get_docstring(ast.parse(text)):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_nothing_is_left_to_do_later() -> None:
    marks = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    found = [path for path in (ROOT / "ultrazoo").rglob("*.py") if marks.search(path.read_text())]
    assert found == []
