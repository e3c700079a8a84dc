"""Every command of the README and of the tutorials is run as written, page by page, in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.shell import ROOT, TUTORIALS, Block, blocks, pages, runnable

RUN = ("bash", "python")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A directory that looks like the checkout to a reader, where nothing of the checkout can be changed."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def _environment() -> dict[str, str]:
    bin_dir = Path(sys.executable).parent
    return os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS)
def test_commands_of_the_page_run(page: str, desk: Path) -> None:
    found = [block for block in blocks(page) if block.language in RUN]
    assert found, f"{page} has no command"
    for block in found:
        if block.title:
            (desk / block.title).write_text(block.text, encoding="utf-8")
            continue
        script = runnable(block) if block.language == "bash" else block.text
        command = (
            ["bash", "-euo", "pipefail", "-c", script] if block.language == "bash" else [sys.executable, "-c", script]
        )
        done = subprocess.run(
            command, cwd=desk, env=_environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{block} failed:\n{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _recipes() -> list[Block]:
    """Every complete recipe that a page shows."""
    return [
        block for page in pages() for block in blocks(page) if block.language == "yaml" and "schema: 1" in block.text
    ]


@pytest.mark.parametrize("block", _recipes(), ids=str)
def test_shown_recipes_can_be_built(block: Block, desk: Path) -> None:
    import ultrazoo

    file = desk / "shown.yaml"
    file.write_text(block.text, encoding="utf-8")
    assert ultrazoo.check(file) == []
