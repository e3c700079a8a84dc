"""Exports that several tests look at, made once in a session: a small Wan with windows, as every target but the compiled."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ultrazoo
from tests.backbones.models import randomise
from ultrazoo.export import Exported, export
from ultrazoo.export.proof import one_process
from ultrazoo.testing.poison import restored_state

SMALL: dict[str, Any] = {
    "schema": 1,
    "name": "small",
    "video": {"grid": [3, 5, 7]},
    "backbone": {"name": "wan", "dim": 16, "heads": 2, "layers": 1, "ffn_dim": 24}
    | {"text_dim": 8, "text_tokens": 6, "time_dim": 16},
    "attention": {"*": {"name": "branched", "branches": {"local": {"layout": {"name": "windows", "counts": 2}}}}},
    "dtype": "float32",
}
TARGETS = ("torchscript", "pt2", "onnx")


def small(**changes: Any) -> dict[str, Any]:
    """The small recipe with other top-level nodes; `backbone` is merged."""
    found = copy.deepcopy(SMALL)
    backbone = changes.pop("backbone", {})
    found["backbone"] |= backbone
    return found | changes


IMAGE: dict[str, Any] = {
    "schema": 1,
    "name": "small_image",
    "video": {"grid": [1, 5, 7]},
    "backbone": {"name": "dit", "dim": 16, "heads": 2, "layers": 1, "ffn_ratio": 2, "classes": 10},
    "attention": {"*": {"name": "full"}},
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def one_prover() -> Iterator[None]:
    """Every proof of the session in one fresh process."""
    with one_process():
        yield


Made = Callable[[str], Exported]
ZERO = "head.head.bias"
"""The one parameter of the saved model that is all zero."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the small model with random weights, as after training, but for `ZERO`."""
    place = tmp_path_factory.mktemp("saved") / "model"
    with restored_state(seed=3):
        model = randomise(ultrazoo.build(small()))
        with torch.no_grad():
            model.get_parameter(ZERO).zero_()
        ultrazoo.save(model, place)
    return place


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, saved: Path, one_prover: None) -> Made:
    """``made(target)``: that model as a file; read only."""
    known: dict[str, Exported] = {}
    place = tmp_path_factory.mktemp("made")

    def of(target: str) -> Exported:
        if target not in known:
            known[target] = export(saved, target, place / target)
        return known[target]

    return of


def copied(made: Exported, place: Path) -> Path:
    """The directory of an export, to do what one likes with."""
    shutil.copytree(made.file.parent, place)
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to stand in, with the recipe ``small.yaml``."""
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    monkeypatch.chdir(tmp_path)
    return tmp_path
