"""What `generate --engine` refuses before anything is sampled, in words, with exit code 2 and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.program import Ran, here
from tests.generate import tiny_pipelines
from tests.generate.commands import listing, refused
from tests.generate.engines import ran
from ultrazoo.errors import UltrazooError, UsageError
from ultrazoo.export import Engine, to_onnx, to_torchscript
from ultrazoo.generate import engine_checks
from ultrazoo.generate.engine import EngineModel
from ultrazoo.generate.memory import Estimate
from ultrazoo.weights.staging import EXPORTED


def test_phases_that_do_not_make_a_run(capsys, place, wan, exported):
    before = listing(place)
    refused(ran(capsys, wan, exported("first")), "is for step 0", "makes 3 steps", "export --phase 1-2 as well")
    refused(
        ran(capsys, wan, exported("first"), exported("rest"), more=("--steps", "4")),
        "at some of 3 steps, got --steps 4",
    )
    refused(
        ran(capsys, wan, exported("first"), exported("rest of another")),
        "not phases of one model: their weights differ",
    )
    refused(ran(capsys, wan, exported("script"), exported("rest")), "not phases of one model: their recipe differ")
    refused(ran(capsys, wan, exported("rest"), exported("rest")), "are both for steps 1-2")
    refused(ran(capsys, wan, exported("script"), exported("script")), "is for every step; give it alone")
    assert listing(place) == before


def test_sizes_outside_the_bounds(capsys, place, wan, exported):
    done = ran(capsys, wan, exported("one size"))
    # static, so for a batch of 1: guidance is two forwards
    assert done.code == 0, done.err
    before = listing(place)

    def told(name: str, *more: str) -> Ran:
        return ran(capsys, wan, exported(name), more=more, out="p.mp4")

    refused(told("one size", "--size", "96x64"), "not exported for width 96 (allowed 64)", "--dynamic w among others")
    refused(told("one size", "--frames", "13", "--size", "64x80"), "13 frames (allowed 9); height 80 (allowed 64)")
    least = 16 * Engine(exported("script")).bounds["w"].low
    assert least > 16
    refused(
        told("script", "--size", "16x64"), f"width 16 (allowed {least} to 65536)", "its design allows no other size"
    )
    refused(
        told("script", "--frames", "1"), "1 frames (allowed 5 to 4093)", "it makes videos: an image and a video are two"
    )
    refused(told("image", "--frames", "5"), "5 frames (allowed 1)", "it makes images")
    refused(told("script", "--size", "61x64"), "nearest legal: 48 or 64")
    refused(told("short text"), "512 text tokens (allowed 16)", "--dynamic text among others")
    assert listing(place) == before


def test_a_file_that_was_not_proved(capsys, place, wan, changed, exported):
    proof = json.loads((exported("script") / EXPORTED).read_text())["proof"]
    folder = changed("script", proof={**proof, "holds": False})
    path = folder / "model.torchscript.pt"
    path.rename(f"{path}.unverified")
    for given in (folder, Path(f"{path}.unverified")):
        refused(ran(capsys, wan, given), "was not proved equal to its model", "export --verify")
    again = here(capsys, "export", "--verify", str(folder))
    assert again.code == 0, again.err
    assert path.exists()
    done = ran(capsys, wan, folder)
    assert done.code == 0, done.err
    shutil.rmtree(folder)
    folder = changed("script", proof={"holds": None, "cases": []})
    refused(ran(capsys, wan, folder, out="p.mp4"), "was exported with --no-verify")


def test_files_that_are_damaged_or_none(capsys, place, wan, changed, exported, monkeypatch):
    before = listing(place)
    folder = changed("script")
    path = folder / "model.torchscript.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(ran(capsys, wan, folder), "model.torchscript.pt is damaged: its content is not what was written")
    path.write_bytes(content[:1000])
    refused(ran(capsys, wan, path), "it has 1000 bytes")
    path.unlink()
    refused(ran(capsys, wan, folder), "model.torchscript.pt is missing")
    refused(ran(capsys, wan, path), "no such file")
    (folder / "mine.torchscript.pt").write_bytes(content)
    refused(
        ran(capsys, wan, folder / "mine.torchscript.pt"),
        "mine.torchscript.pt is not the file that",
        "model.torchscript.pt",
    )
    (folder / EXPORTED).write_text('{"ultrazoo": "1", "schema": 1, "target": "pt2"}')
    refused(ran(capsys, wan, folder), "export.json is damaged: name, hash")
    (folder / EXPORTED).write_text('{"ultrazoo": "9", "schema": 2}')
    refused(ran(capsys, wan, folder), "has schema 2", "upgrade ultrazoo")
    (folder / EXPORTED).unlink()
    refused(ran(capsys, wan, folder), "holds no export.json")
    refused(ran(capsys, wan, place / "tiny.yaml"), "tiny.yaml is no exported model")
    shutil.rmtree(folder)
    monkeypatch.setitem(to_onnx.NEEDS, "onnxruntime", "99.0")
    refused(
        ran(capsys, wan, changed("script", target="onnx")),
        "99.0 is the oldest that will do; pip install 'ultrazoo[export]'",
    )
    shutil.rmtree(folder)
    assert listing(place) == before


def test_what_a_runtime_does_not_take_is_told(monkeypatch, exported):
    engine = Engine(exported("script"))
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 12)
    monkeypatch.setattr(to_torchscript.Loaded, "run", lambda *_: 1 / 0)
    with pytest.raises(
        UltrazooError, match=r"model.torchscript.pt failed at batch 1, grid 3x4x4, text 7: ZeroDivisionError"
    ):
        engine(*inputs)
    engine.release()
    monkeypatch.setattr(to_torchscript, "Loaded", lambda _: torch.load("nowhere"))
    with pytest.raises(UsageError, match=r"cannot be loaded here: FileNotFoundError.*export again"):
        engine(*inputs)


def test_a_recipe_that_was_edited(capsys, wan, changed, exported):
    content = json.loads((exported("script") / EXPORTED).read_text())
    folder = changed("script", recipe={**content["recipe"], "video": {"grid": [3, 4, 5]}})
    refused(ran(capsys, wan, folder), "its recipe has hash", "the file was edited")
    assert not Path("o.mp4").exists()


def test_models_that_do_not_fit_the_pipeline(capsys, place, wan, exported):
    refused(
        ran(capsys, wan, exported("wide")), "in_channels is 8, the pipeline's 4", "text_dim is 16, the pipeline's 12"
    )
    refused(
        ran(capsys, wan, exported("strided")),
        "a VAE with strides (4, 16, 16) over (T, H, W), the pipeline's are (4, 8, 8)",
    )
    refused(ran(capsys, wan, exported("dit")), "is a 'dit' model, and no pipeline calls one; pipelines call wan")
    image = tiny_pipelines.pipeline_folder("PixArtSigmaPipeline", place / "pixart")
    refused(
        ran(capsys, image, exported("script"), out="o.png"), "no exported file stands in for PixArtTransformer2DModel"
    )
    tiny_pipelines.wan(place / "two", experts=2)
    refused(ran(capsys, place / "two", exported("script")), "has two transformers")
    assert not list(place.glob("o.*"))


def test_other_dtypes_and_devices(capsys, wan, changed, exported):
    refused(ran(capsys, wan, exported("script"), more=("--dtype", "bfloat16")), "counts in float32, which is fixed")
    elsewhere = changed("script", device=f"cuda:{torch.cuda.device_count()}")
    refused(ran(capsys, wan, elsewhere), "was exported for cuda", "export it again with --device cpu")
    gpu = torch.device("cuda")
    scripted, session = EngineModel([exported("script")]), EngineModel([changed("script", target="onnx")])
    assert len(engine_checks.notes(scripted, torch.device("cpu"), 1)) == 1
    told = engine_checks.notes(session, gpu, 5_000_000)[1]
    assert told.startswith(
        "the file computes on the cpu, as onnxruntime does, everything else on cuda; it needs about 5 MB"
    )
    assert "for which it was exported" in engine_checks.notes(scripted, gpu, 1)[1]
    with pytest.raises(UsageError, match=r"and needs about 1e\+07 GB there"):
        engine_checks.notes(session, gpu, 10**16)


def test_memory_of_a_file(changed, exported):
    session, script = EngineModel([changed("script", target="onnx")]), EngineModel([exported("script")])
    grid = script.plan.grid
    # 2 heads of the full layer hold all 48 by 48 scores
    assert session.activation_bytes(grid) - script.activation_bytes(grid) == 2 * 48 * 48 * 4
    # one component at a time beside the one that stays
    found = Estimate({"text_encoder": 100, "transformer": 30, "vae": 5}, 7, 0, 0, None, True, ("transformer",))
    assert found.sampling == 130
    assert (
        Estimate({"text_encoder": 2, "transformer": 30, "vae": 5}, 7, 0, 0, None, True, ("transformer",)).sampling == 37
    )
