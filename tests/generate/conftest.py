"""A tiny Wan pipeline, a place with a recipe for it, latents that were sampled there, native models that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import here
from tests.generate.commands import made
from tests.generate.runs import FULL, NATIVE, recipe
from tests.generate.tiny_pipelines import pipeline_folder

RECIPE = """\
schema: 1
name: tiny
video: {width: 64, height: 64, frames: 9}
sampling: {steps: 3, guidance: 4.0}
attention: {"*": {name: full}}
dtype: float32
"""


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder("WanPipeline", tmp_path_factory.mktemp("wan") / "WanPipeline")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where we stand: an empty folder but for ``tiny.yaml``."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sampled(wan: Path, place: Path, capsys: Any) -> Path:
    """Latents of a run that is done, its output gone."""
    assert made(capsys, wan).code == 0
    (place / "o.mp4").unlink()
    return place / "o.latents.safetensors"


@pytest.fixture
def build(place: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Builds a native Wan into the folder `name` and gives its path."""

    def building(
        name: str, attention: Any = FULL, weights: Path | None = None, more: Any = None, **changes: Any
    ) -> Path:
        node = {"name": "wan", **NATIVE, **changes}
        found = recipe(attention, backbone=node, **(more or {}))
        if weights is not None:
            found["weights"] = {"path": str(weights)}
        (place / f"{name}.yaml").write_text(json.dumps(found))
        ran = here(capsys, "build", f"{name}.yaml", "-o", name)
        assert ran.code == 0, ran.err
        return place / name

    return building
