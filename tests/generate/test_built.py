"""A model in the transformer's place: built, trained, or changed by `apply`; and tuned weights of a design alone."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import torch

import ultrazoo
from tests.cli.program import here
from tests.generate.commands import made, refused
from tests.generate.runs import FULL, WINDOWS, latents, recipe
from tests.generate.tiny_pipelines import pipeline_folder
from ultrazoo.generate.latents import Latents
from ultrazoo.testing import error_ratio
from ultrazoo.weights.own import new_slots


def test_a_built_model_with_the_pipelines_weights(capsys, place, wan, build):
    lines: list[str] = []
    model = build("native", weights=wan / "transformer")
    ours = latents(model, wan, place / "ours", lines)
    saved = ("--from-latents", "ours.latents.safetensors", "--pipeline", str(wan), "-o", "again.mp4")
    assert here(capsys, "generate", "native", *saved).code == 0
    theirs = latents(recipe({"*": {"name": "original"}}), wan, place / "theirs")
    assert error_ratio(ours, theirs) < 1e-4
    assert not any("warning" in line for line in lines)
    tuned = build("local", WINDOWS, weights=wan / "transformer")
    refused(here(capsys, "generate", "local", *saved, "--force"), "latents of another run", "the recipe was tiny")
    other = latents(tuned, wan, place / "other", lines)
    assert error_ratio(other, theirs) > 1e-2
    assert any(line.startswith("warning: branched needs tuning") for line in lines)
    # the same as the adapter's, and at a size that it was not built for
    assert error_ratio(other, latents(recipe(WINDOWS), wan, place / "adapted")) < 1e-4
    wide = latents(tuned, wan, place / "wide", width=96, frames=5)
    assert wide.shape == (1, 4, 2, 8, 12)
    assert error_ratio(wide, latents(recipe(WINDOWS), wan, place / "wide2", width=96, frames=5)) < 1e-4


def test_a_built_model_knows_its_steps(capsys, place, wan, build):
    steps = {"steps": {"0": FULL}}
    model = build("stepped", WINDOWS, weights=wan / "transformer", more=steps)
    asked = ("--pipeline", str(wan), "-o", "o.mp4", "--prompt", "a red ball", "--steps", "4")
    refused(here(capsys, "generate", str(model), *asked), "at some of 3 steps, got --steps 4")
    ours = latents(model, wan, place / "ours")
    assert error_ratio(ours, latents(recipe(WINDOWS, **steps), wan, place / "theirs")) < 1e-4
    assert error_ratio(ours, latents(recipe(WINDOWS), wan, place / "near")) > 1e-3


def test_built_models_that_do_not_fit(capsys, place, wan, build):
    lines: list[str] = []
    latents(build("random"), wan, place / "random", lines)
    assert any("built without weights: its numbers are random" in line for line in lines)

    def run(name: str, *more: str) -> Any:
        asked = ("--pipeline", str(wan), "-o", "o.mp4", "--prompt", "a red ball")
        return here(capsys, "generate", name, *more, *asked)

    build("wider", channels=8)
    refused(run("wider"), "in_channels is 8, the pipeline's 4; out_channels is 8, the pipeline's 4")
    refused(run("random", "attention.*.name=full"), "is built: key=value changes nothing in it")
    refused(run("random", "--size", "61x64"), "nearest legal: 48 or 64")
    image = pipeline_folder("PixArtSigmaPipeline", place / "pixart")
    asked = ("--pipeline", str(image), "-o", "o.png", "--prompt", "a")
    refused(here(capsys, "generate", "random", *asked), "is a 'wan' model, the pipeline is for PixArt")
    assert not (place / "o.mp4").exists()


def test_a_model_that_was_trained_is_not_called_random(place, wan, build):
    model = ultrazoo.from_pretrained(build("start", WINDOWS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    ultrazoo.save(model, place / "trained")
    lines: list[str] = []
    latents(place / "trained", wan, place / "o", lines)
    assert not any("warning" in line for line in lines)


def test_a_model_that_a_recipe_was_applied_to(capsys, place, wan):
    """Saved whole it takes the transformer's place; its new parameters alone go into the transformer."""
    design = recipe({"*": {"name": "ultragen", "windows": 2, "rank": 2}})
    transformer = diffusers.WanTransformer3DModel.from_pretrained(wan / "transformer")
    ultrazoo.apply(transformer, design)
    with torch.no_grad():
        for slot in new_slots(transformer):
            slot.get().add_(0.3)
    ultrazoo.save(transformer, place / "whole")
    ultrazoo.save(transformer, place / "new", parts="new")
    lines: list[str] = []
    ours = latents(place / "whole", wan, place / "ours", lines)
    assert not any("random" in line for line in lines)
    asked = ("--pipeline", str(wan), "-o", "o.mp4", "--prompt", "a red ball")
    ran = here(capsys, "generate", "new", *asked)
    refused(ran, "new parameters of a design alone", "new/recipe.yaml weights.path=new")
    told = ran.err.rpartition("give its recipe and them, ")[2].split()
    ran = here(capsys, "generate", *told, *asked)
    assert ran.code == 0, ran.err
    assert error_ratio(Latents.load(place / "o.latents.safetensors").video[0], ours) < 1e-4
    assert error_ratio(ours, latents(design, wan, place / "fresh")) > 1e-2


def test_an_applied_model_of_another_class_or_size_is_refused(capsys, place, wan):
    settings = json.loads((wan / "transformer" / "config.json").read_text())
    wider = diffusers.WanTransformer3DModel.from_config({**settings, "text_dim": 16})
    image = diffusers.PixArtTransformer2DModel.from_pretrained(
        pipeline_folder("PixArtSigmaPipeline", place / "pixart") / "transformer"
    )
    asked = ("--pipeline", str(wan), "-o", "o.mp4", "--prompt", "a red ball")
    for name, model, said in (
        ("wider", wider, "text_dim is 16, the pipeline's 12"),
        ("image", image, "is a 'diffusers/PixArtTransformer2DModel' model, the pipeline is for WanTransformer3DModel"),
    ):
        ultrazoo.apply(model, {"name": "tiny", "video": {"width": 64, "height": 64}, "attention": FULL})
        ultrazoo.save(model, place / name)
        refused(here(capsys, "generate", name, *asked), said)
    assert not list(place.glob("o.*"))


# tuned weights


def test_tuned_weights_of_a_design(capsys, place, wan):
    """A design with parameters of its own, trained elsewhere: loaded beside the model's weights, and no warning said."""
    ran = made(capsys, wan, "attention.*={name: ultragen, windows: 2, rank: 2}")
    assert ran.code == 0, ran.err
    # as it expands
    assert "warning: branched needs tuning" in ran.err
    fresh = Latents.load(place / "o.latents.safetensors")

    design = (place / "tiny.yaml").read_text().replace("{name: full}", "{name: ultragen, windows: 2, rank: 2}")
    (place / "there").mkdir()
    recipe_file = place / "there" / "tuned.yaml"
    recipe_file.write_text(design)
    transformer = diffusers.WanTransformer3DModel.from_pretrained(wan / "transformer")
    report = ultrazoo.apply(transformer, recipe_file)
    # what latents say of their recipe is what apply says of it
    assert report.plan.hash == fresh.facts["recipe_hash"]
    with torch.no_grad():
        for slot in new_slots(transformer):
            slot.get().add_(0.3)
    ultrazoo.save(transformer, place / "there" / "weights", parts="new")
    recipe_file.write_text(design + "weights: {path: weights}\n")
    asked = ("--pipeline", str(wan), "-o", "p.mp4", "--prompt", "a red ball")
    ran = here(capsys, "generate", str(recipe_file), *asked)
    assert ran.code == 0, ran.err
    assert "warning" not in ran.err
    tuned = Latents.load(place / "p.latents.safetensors")
    assert not torch.allclose(tuned.video[0], fresh.video[0], atol=1e-3)

    ran = here(capsys, "generate", str(recipe_file), "attention.*.rank=4", *asked, "--force", "--latents", "new")
    refused(ran, "weights")
    assert not (place / "new").exists()
