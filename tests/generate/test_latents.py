"""Saved latents: whose they are, and what is not taken for latents."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.program import here
from tests.generate.commands import decoded, refused
from tests.generate.tiny_pipelines import pipeline_folder
from ultrazoo.generate.latents import Latents


def test_latents_of_this_run_are_decoded_with_its_recipe(capsys, wan, sampled):
    ran = decoded(capsys, wan, "tiny.yaml", "--from-latents", str(sampled), "--size", "64x64", "--seed", "0")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "80x64"), "width was 64, asked for is 80"),
        (("--frames", "5"), "frames was 9, asked for is 5"),
        (("--seed", "3"), "seed was 0, asked for is 3"),
        (("--prompt", "the sea"), "prompt was 'a red ball', asked for is 'the sea'"),
        (("tiny.yaml", "attention.*.name=original"), "the recipe was tiny with hash "),
    ],
)
def test_latents_of_another_run(capsys, place, wan, sampled, options, said):
    refused(decoded(capsys, wan, *options, "--from-latents", str(sampled)), "latents of another run", said)
    assert not (place / "o.mp4").exists()


def test_latents_of_another_model(capsys, place, wan, sampled):
    other = pipeline_folder("PixArtSigmaPipeline", place / "pixart")
    ran = here(capsys, "generate", "--from-latents", str(sampled), "--pipeline", str(other), "-o", "o.png")
    refused(ran, "the pipeline was WanPipeline", "is PixArtSigmaPipeline")
    shutil.copytree(wan, place / "wider")
    settings = place / "wider" / "vae" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "z_dim": 48}))
    ran = decoded(capsys, place / "wider", "--from-latents", str(sampled))
    refused(ran, "has other settings", "their shape is (1, 4, 3, 8, 8)", "decodes 48 channels")
    assert not list(place.glob("o.[mp]*"))


def noted(**changes: Any) -> Callable[[Path], None]:
    """The file with other notes: a value of None leaves one out."""

    def change(file: Path) -> None:
        latents = Latents.load(file)
        notes = {"format": "ultrazoo latents 1", "facts": json.dumps(latents.facts), "plain": "{}", **changes}
        kept = {key: value for key, value in notes.items() if value is not None}
        save_file({"video.0": latents.video[0]}, file, metadata=kept)

    return change


def holding(name: str, value: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        latents = Latents.load(file)
        notes = {"format": "ultrazoo latents 1", "facts": json.dumps(latents.facts), "plain": "{}"}
        save_file({name: torch.full_like(latents.video[0], value)}, file, metadata=notes)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "cannot be read as saved latents"),
        (lambda file: os.truncate(file, 100), "cannot be read as saved latents"),
        (lambda file: os.truncate(file, file.stat().st_size - 4), "cannot be read as saved latents"),
        (lambda file: file.write_bytes(b""), "cannot be read as saved latents"),
        (lambda file: save_file({"x": torch.zeros(1)}, file), "no latents of ultrazoo generate"),
        (noted(format="ultrazoo latents 0"), "no latents of ultrazoo generate"),
        (noted(facts=None), "is damaged"),
        (noted(facts="{"), "is damaged"),
        (noted(facts='{"pipeline": "WanPipeline"}'), "its notes lack vae, recipe, "),
        (noted(plain="7"), "is damaged"),
        (holding("audio.0", 0.0), "it holds no latents of pictures"),
        (holding("first", 0.0), "is damaged"),
        (holding("video.0", float("nan")), "not finite"),
    ],
)
def test_damaged_latents(capsys, place, wan, sampled, damage, said):
    damage(sampled)
    refused(decoded(capsys, wan, "--from-latents", str(sampled)), sampled.name, said)
    assert not (place / "o.mp4").exists()
