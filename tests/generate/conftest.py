"""A tiny Wan pipeline, a place with a recipe for it, latents that were sampled there, native models that fit it, built or
exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ultrazoo
from tests.cli.program import here
from tests.generate.commands import made
from tests.generate.engines import FILES, MODELS, Give
from tests.generate.runs import FULL, NATIVE, recipe
from tests.generate.tiny_parts import randomised
from tests.generate.tiny_pipelines import pipeline_folder
from ultrazoo.export import export
from ultrazoo.export.proof import one_process
from ultrazoo.weights.staging import EXPORTED

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


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Give, Give]]:
    """`model(name)` builds one of `MODELS`, `file(name)` exports one of `FILES`, once each, when they are asked for."""
    place = tmp_path_factory.mktemp("engines")

    def model(name: str) -> Path:
        folder = place / "models" / name.replace(" ", "-")
        if not folder.exists():
            source, seed = MODELS[name]
            built = ultrazoo.build(source)
            torch.manual_seed(seed)
            ultrazoo.save(randomised(built), folder)
        return folder

    def file(name: str) -> Path:
        folder = place / "files" / name.replace(" ", "-")
        if not folder.exists():
            source, how = FILES[name]
            export(model(source) if isinstance(source, str) else source, out=folder, **{"to": "torchscript", **how})
        return folder

    # the fresh process that proves them is one for all: what it takes to start is not what is tested here
    with one_process():
        yield model, file


@pytest.fixture
def model(shelf: tuple[Give, Give]) -> Give:
    return shelf[0]


@pytest.fixture
def exported(shelf: tuple[Give, Give]) -> Give:
    return shelf[1]


@pytest.fixture
def changed(place: Path, exported: Give) -> Callable[..., Path]:
    """A copy of an exported file, with entries of its export.json changed."""

    def change(name: str, /, **entries: Any) -> Path:
        stem = f"copy-of-{name.replace(' ', '-')}"
        copy = place / f"{stem}-{len(list(place.glob(stem + '*')))}"
        shutil.copytree(exported(name), copy)
        path = copy / EXPORTED
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, **entries}))
        return copy

    return change
