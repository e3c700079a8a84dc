"""Every command of the README and of the tutorials is run as written, page by page, in order.

The lines run in this process, through the program's own entry, so that torch is imported once and not thirty times. A line of
a page is therefore one command with at most a redirection; anything else fails here, as something that is not run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ultrazoo
from tests.docs.shell import ROOT, TUTORIALS, Block, blocks, pages, runnable
from ultrazoo import registry
from ultrazoo.cli import main


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that looks like the checkout to a reader, where nothing of the checkout can be changed."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    yield tmp_path
    assert not (ROOT / "frames.py").exists()


def _type(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run one line of a shell block: its exit code, and what it printed on stderr."""
    words = shlex.split(line, comments=True)
    target = words[words.index(">") + 1] if ">" in words else None
    if ">" in words:
        words = words[: words.index(">")]
    assert words[0] == "ultrazoo", f"this test cannot run {line!r}"
    assert not {"|", "&&", ";", "<"} & set(words), f"one command a line: {line!r}"
    # parts of a file given by --plugin live in one command, as they do for a person
    before = dict(registry._LOCAL)
    try:
        code = main(words[1:])
    finally:
        registry._LOCAL.clear()
        registry._LOCAL.update(before)
    printed = capsys.readouterr()
    if target is not None:
        Path(target).write_text(printed.out, encoding="utf-8")
    return code, printed.err


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS)
def test_commands_of_the_page_run(page: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for block in blocks(page):
        if block.title:
            (desk / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            for line in runnable(block):
                code, said = _type(line, capsys)
                assert code == 0, f"{block}: {line}\n{said}"
                ran += 1
        elif block.language == "python":
            scope: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(block.text, str(block), "exec"), scope)
            ran += 1
    assert ran, f"{page} has no command"


def _recipes() -> list[Block]:
    """Every complete recipe that a page shows; one without a backbone takes that of a model that is there."""
    shown = [
        block for page in pages() for block in blocks(page) if block.language == "yaml" and "schema: 1" in block.text
    ]
    return [block for block in shown if "backbone:" in block.text or "extends:" in block.text]


@pytest.mark.parametrize("block", _recipes(), ids=str)
def test_shown_recipes_can_be_built(block: Block, desk: Path) -> None:
    file = desk / "shown.yaml"
    file.write_text(block.text, encoding="utf-8")
    assert ultrazoo.check(file) == []
