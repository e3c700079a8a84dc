"""One package compiled by AOTInductor, from the command line to the engine; each costs a compiler a minute."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import ultrazoo
from tests.backbones.models import randomise
from tests.cli.program import here
from tests.export.conftest import IMAGE
from tests.export.damage import sealed
from ultrazoo.errors import CheckFailed
from ultrazoo.export import Engine, verify
from ultrazoo.export.proof import ratio
from ultrazoo.export.sizes import inputs_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, and there is no g++"),
]


def test_a_compiled_package(capsys, tmp_path, one_prover):
    model = randomise(ultrazoo.build(IMAGE)).eval()
    ultrazoo.save(model, tmp_path / "model")
    ran = here(capsys, "export", tmp_path / "model", "--to", "aoti", "-o", tmp_path / "made")
    assert ran.code == 0, ran.err
    # neither the compiler nor torch says a word, and nothing of their work stays
    assert [line for line in ran.err.splitlines() if not line.startswith(("making", "tracing", "writing"))][:2] == [
        "running the model at 4 sizes",
        "proving model.aoti.pt2 in a fresh process",
    ]
    assert {one.name for one in (tmp_path / "made").iterdir()} == {"model.aoti.pt2", "proof.safetensors", "export.json"}
    content = json.loads((tmp_path / "made" / "export.json").read_text())
    assert content["proof"]["holds"] is True
    assert content["proof"]["runtime"]["flash"] is True
    assert content["interior"]["faster_than_tokens"] is None
    file = tmp_path / "made" / "model.aoti.pt2"
    with zipfile.ZipFile(file) as package:
        told = [package.read(name) for name in package.namelist() if name.endswith("metadata.json")]
    assert any(content["hash"].encode() in one for one in told)
    assert (
        json.loads(torch._inductor.aoti_load_package(str(file)).get_metadata()["ultrazoo"])["bounds"]
        == content["bounds"]
    )
    engine = Engine(file)
    inputs = inputs_at(engine.ports, {"b": 1, "h": 9, "w": 4}, torch.float32, seed=3)
    with torch.no_grad():
        assert ratio(engine(*inputs.values()), model(*inputs.values())) <= 1e-5
    # an answer that is off by a thousandth is none
    kept = load_file(tmp_path / "made" / "proof.safetensors")
    save_file(
        {name: value * 1.001 if name.endswith("output") else value for name, value in kept.items()},
        tmp_path / "made" / "proof.safetensors",
    )
    sealed(tmp_path / "made")
    with pytest.raises(CheckFailed, match="is not the model"):
        verify(file)
