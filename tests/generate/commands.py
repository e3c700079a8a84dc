"""`ultrazoo generate` as typed, and what is expected of it when it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.program import Ran, here


def made(
    capsys: pytest.CaptureFixture[str], folder: Path, *more: str, prompt: str = "a red ball", out: str = "o.mp4"
) -> Ran:
    prompted = ("--prompt", prompt) if prompt else ()
    return here(capsys, "generate", "tiny.yaml", "--pipeline", str(folder), "-o", out, *prompted, *more)


def decoded(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> Ran:
    return here(capsys, "generate", *more, "--pipeline", str(folder), "-o", "o.mp4")


def refused(ran: Ran, *said: str, code: int = 2) -> None:
    assert ran.code == code, ran.err
    assert ran.out == ""
    for words in said:
        assert words in ran.err
    for word in ("Traceback", "internal error"):
        assert word not in ran.err


def listing(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}
