"""A small recipe in an empty directory."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY = """\
schema: 1
name: tiny
summary: three branches on a small Wan
video: {width: 256, height: 256, frames: 9}
sampling: {steps: 4, guidance: 5.0}
backbone: {name: wan, preset: t2v_1_3b, layers: 3, dim: 48, heads: 2, ffn_dim: 96, text_dim: 32}
attention:
  "*": {name: ultragen, rank: 4}
  "0": {name: full}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to stand in, with the recipe ``tiny.yaml``."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path
