"""`generate --engine`: an exported file in the transformer's place gives the latents of the model that it was made of.

Error ratios of latents after 10 steps; in fp32 4e-7 to 3e-6 were seen, in fp16 1.2e-3, in bf16 5e-3.
"""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

import ultrazoo
from tests.cli.program import here
from tests.generate.commands import listing, refused
from tests.generate.engines import design, ran
from tests.generate.runs import FULL, NATIVE, WINDOWS, latents, recipe
from ultrazoo.errors import UsageError
from ultrazoo.export import export
from ultrazoo.generate.engine import EngineModel, per_sample, require_same_recipe
from ultrazoo.generate.latents import Latents
from ultrazoo.generate.media import read_note
from ultrazoo.testing import error_ratio
from ultrazoo.weights.staging import EXPORTED

ALLOWED = 2e-5
"""In fp32."""
HALF = {"half": 5e-3, "brain": 2e-2}
"""Of the models in fp16 and bf16."""
RUN = {"steps": 10, "guidance": 4.0}


# the same latents


@pytest.mark.parametrize("name", ["onnx", "pt2", "script", pytest.param("aoti", marks=pytest.mark.proof)])
def test_ten_steps_with_a_file_are_ten_steps_with_the_model(place, wan, model, exported, name):
    due = latents(model("model"), wan, place / "due", **RUN)
    lines: list[str] = []
    got = latents(None, wan, place / "got", lines, engines=(exported(name),), **RUN)
    assert error_ratio(got, due) < ALLOWED
    assert not any("warning" in line for line in lines)
    # a larger, ragged clip, which nothing was traced or proved at
    more = {**RUN, "width": 112, "height": 80, "frames": 17}
    got = latents(None, wan, place / "large", engines=(exported(name),), **more)
    assert got.shape == (1, 4, 5, 10, 14)
    assert error_ratio(got, latents(model("model"), wan, place / "due2", **more)) < ALLOWED
    # null tests
    assert error_ratio(latents(None, wan, place / "seed", engines=(exported(name),), seed=1, **RUN), due) > 0.1
    assert error_ratio(latents(None, wan, place / "weights", engines=(exported("other"),), **RUN), due) > 0.01


@pytest.mark.proof
@pytest.mark.parametrize("name", HALF)
def test_ten_steps_in_half_precision(place, wan, model, exported, name):
    due = latents(model(name), wan, place / "due", **RUN).float()
    got = latents(None, wan, place / "got", engines=(exported(name),), **RUN).float()
    assert error_ratio(got, due) < HALF[name]
    assert error_ratio(latents(None, wan, place / "seed", engines=(exported(name),), seed=1, **RUN).float(), due) > 0.1


def test_a_pipeline_called_by_hand(place, wan, model, exported):
    found = []
    for transformer in (EngineModel([exported("script")]), ultrazoo.from_pretrained(model("model"))):
        pipeline = diffusers.WanPipeline.from_pretrained(wan)
        pipeline.transformer = transformer
        pipeline.set_progress_bar_config(disable=True)
        asked = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
        found.append(pipeline("a red ball", generator=torch.Generator().manual_seed(0), **asked).frames)
    assert error_ratio(*found) < ALLOWED


def test_what_is_said_and_kept(capsys, place, wan, model, exported):
    done = ran(capsys, wan, exported("script") / "model.torchscript.pt", more=("--json",))
    assert done.code == 0, done.err
    assert "model.torchscript.pt (torchscript, float32)" in done.err
    content = json.loads((exported("script") / EXPORTED).read_text())
    sha256 = content["files"]["model.torchscript.pt"]["sha256"]
    facts = Latents.load("o.latents.safetensors").facts
    assert facts["engine"] == [{"target": "torchscript", "phase": None, "sha256": {"model.torchscript.pt": sha256}}]
    assert (facts["recipe_hash"], facts["steps"], facts["guidance"]) == (content["hash"], 3, 4.0)
    assert read_note("o.mp4")["engine"] == json.loads(done.out)["engine"] == facts["engine"]

    saved = ("--from-latents", "o.latents.safetensors", "--pipeline", str(wan), "-o")
    (place / "same.yaml").write_text(json.dumps(design()))
    for number, beside in enumerate(
        ((), ("same.yaml",), (str(model("model")),), ("--engine", str(exported("script"))))
    ):
        again = here(capsys, "generate", *beside, *saved, f"{number}.mp4")
        assert again.code == 0, again.err
        assert read_note(f"{number}.mp4")["engine"] == facts["engine"]
    refused(
        here(capsys, "generate", "--engine", str(exported("other")), *saved, "p.mp4"), "the engine was", sha256[:12]
    )
    refused(
        here(capsys, "generate", "same.yaml", "attention.0.name=full", *saved, "p.mp4"), "the recipe was tiny with hash"
    )
    latents(model("model"), wan, place / "eager")
    asked = ("--engine", str(exported("script")), "--from-latents", "eager.latents.safetensors", "--pipeline", str(wan))
    refused(
        here(capsys, "generate", *asked, "-o", "p.mp4"),
        "the engine was no exported file, here it is model.torchscript.pt",
    )
    assert not (place / "p.mp4").exists()


def test_a_recipe_beside_a_file(capsys, place, wan, model, exported):
    (place / "same.yaml").write_text(json.dumps(design()))
    for number, source in enumerate(("same.yaml", str(model("model")))):
        done = ran(capsys, wan, exported("script"), more=(source,), out=f"{number}.mp4")
        assert done.code == 0, done.err
    before = listing(place)
    (place / "other.yaml").write_text(json.dumps(design(FULL)))
    told = ran(capsys, wan, exported("script"), more=("other.yaml",))
    refused(told, "other.yaml is not what", "was exported from", "leave the recipe out")
    refused(ran(capsys, wan, exported("script"), more=("same.yaml", "video.frames=5")), "is not what")
    refused(ran(capsys, wan, exported("script"), more=(str(model("stepped")),)), "is not what")
    refused(ran(capsys, wan, exported("script"), more=("attention.0.name=full",)), "generate needs a recipe")
    assert listing(place) == before | {"other.yaml"}
    exported = EngineModel([exported("script")])
    with pytest.raises(UsageError, match="is exported: key=value changes nothing"):
        require_same_recipe(None, ("dtype=float16",), exported)


def test_numbers_that_are_random_or_untuned(place, wan, exported, tmp_path):
    lines: list[str] = []
    latents(None, wan, place / "fresh", lines, engines=(exported("fresh"),))
    assert any("built without weights: its numbers are random" in line for line in lines)
    source = recipe(WINDOWS, backbone={"name": "wan", **NATIVE}, weights={"path": str(wan / "transformer")})
    export(source, "torchscript", tmp_path / "loaded")
    loaded = EngineModel([tmp_path / "loaded"])
    assert [line.partition(" (")[0] for line in loaded.warnings()] == ["branched needs tuning"]
    assert (
        error_ratio(
            latents(None, wan, place / "a", engines=(tmp_path / "loaded",)), latents(recipe(WINDOWS), wan, place / "b")
        )
        < 1e-4
    )


# a step schedule


def test_the_phases_of_a_schedule(place, wan, model, exported):
    due = latents(model("stepped"), wan, place / "due")
    phases = (exported("rest"), exported("first"))
    assert error_ratio(latents(None, wan, place / "got", engines=phases), due) < ALLOWED
    facts = Latents.load(place / "got.latents.safetensors").facts["engine"]
    assert [one["phase"] for one in facts] == [[0, 0], [1, 2]]
    together = EngineModel(phases)
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 12)
    with pytest.raises(UsageError, match="runs at some steps alone"):
        together(*inputs)
    eager = ultrazoo.from_pretrained(model("stepped"))
    found = []
    for step in (0, 1, 2):
        eager.select(step, 3)
        with together.cache_context("cond", step_index=step, num_inference_steps=3), torch.no_grad():
            found.append(together(*inputs)[0])
            assert error_ratio(found[-1], eager(*inputs)) < ALLOWED
        # the other has given its memory back
        assert [one._loaded is not None for one in together.engines] == [step == 0, step > 0]
    # the schedule matters
    assert error_ratio(found[0], found[1]) > 1e-3


# what a pipeline reads of a transformer


def test_the_model_by_itself(model, exported):
    engine, eager = EngineModel([exported("script")]), ultrazoo.from_pretrained(model("model"))
    assert engine.config == eager.config
    assert (engine.dtype, engine.device) == (torch.float32, torch.device("cpu"))
    # the pipeline moves its models; numbers stay as the file has them
    assert engine.to(torch.bfloat16).dtype == torch.float32
    assert engine.to("meta").device.type == "meta"
    x, time, text = torch.randn(2, 4, 3, 8, 8), torch.tensor([900.0, 20.0]), torch.randn(2, 7, 12)
    named = {"hidden_states": x, "encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        due = eager(**named, timestep=time)[0]
    assert error_ratio(engine(**named, timestep=time)[0], due) < ALLOWED
    # a pipeline of Wan 2.2 gives every token its time, all of them equal; memory in another order is the same
    per_token = time[:, None].expand(2, 48)
    turned = {**named, "hidden_states": x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)}
    assert error_ratio(engine(**turned, timestep=per_token)[0], due) < ALLOWED
    with pytest.raises(UsageError, match=r"a noise level for every token, \(1, 3\), and they differ"):
        per_sample(torch.tensor([[1.0, 2.0, 1.0]]))
    with pytest.raises(UsageError, match="attention_kwargs"):
        engine(**named, timestep=time, attention_kwargs={"scale": 1})
    with pytest.raises(UsageError, match="an engine needs a file"):
        EngineModel([])


def test_an_image(place, wan, exported):
    got = latents(None, wan, place / "image", engines=(exported("image"),))
    assert got.shape == (1, 4, 1, 8, 8)
