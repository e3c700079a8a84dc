"""What `generate` refuses, in words, with exit code 2 and nothing written; what it keeps when it fails half way."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.program import Ran, here
from tests.generate.commands import listing, made, refused
from tests.generate.tiny_pipelines import pipeline_folder
from ultrazoo.errors import OutputError
from ultrazoo.generate.latents import Latents
from ultrazoo.generate.media import write_video

# the pipeline's folder


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def indexed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def index_says(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model_index.json").write_text(text) and None


def vae_file(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "vae" / "diffusion_pytorch_model.safetensors")


def pickled(file: Path) -> None:
    torch.save({"a": torch.zeros(1)}, file.with_suffix(".bin"))
    file.unlink()


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no VAE folder": (without("vae"), "component vae is missing"),
    "no VAE named": (indexed(vae=[None, None]), "has no vae"),
    "VAE without settings": (lambda folder: (folder / "vae/config.json").unlink(), "settings of the vae"),
    "VAE without weights": (vae_file(Path.unlink), "cannot be opened"),
    "VAE as a pickle": (vae_file(pickled), "safetensors"),
    "VAE cut short": (vae_file(lambda file: os.truncate(file, 1000)), "diffusion_pytorch_model.safetensors"),
    "no transformer": (without("transformer"), "component transformer is missing"),
    "no pipeline": (lambda folder: (folder / "model_index.json").unlink(), "is not a pipeline's folder"),
    "nothing there": (shutil.rmtree, "does not exist"),
    "an unknown class": (indexed(_class_name="WanPipelin"), "did you mean 'WanPipeline'?"),
    "somebody's class": (indexed(_class_name=["pipeline", "Mine"]), "['pipeline', 'Mine'] is not one that"),
    "somebody's part": (indexed(scheduler=["antigravity", "Up"]), "scheduler from 'antigravity'"),
    "no JSON": (index_says("{"), "cannot be read as JSON"),
    "JSON of something": (index_says("[1]"), "not the names of a pipeline's parts"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_serve(capsys, place, wan, case):
    change, said = FOLDERS[case]
    shutil.copytree(wan, place / "pipe")
    change(place / "pipe")
    before = listing(place)
    refused(made(capsys, place / "pipe"), said)
    assert listing(place) == before


def test_sizes_are_those_of_the_vae_that_is_there(capsys, place, wan):
    shutil.copytree(wan, place / "pipe")
    settings = place / "pipe" / "vae" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "scale_factor_spatial": 16}))
    refused(made(capsys, place / "pipe", "--size", "80x64"), "multiple of 32 (VAE stride 16", "nearest legal: 64 or 96")
    assert not list(place.glob("o.*"))


# what is asked for


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "width": (("--size", "61x64"), "nearest legal: 48 or 64"),
    "height": (("--size", "64x8"), "nearest legal: 16"),
    "frames": (("--frames", "10"), "nearest legal: 9 or 13"),
    "size in words": (("--size", "large"), "WIDTHxHEIGHT"),
    "suffix": (("-o", "o.png"), "makes videos, written as .mp4"),
    "a missing folder's parent is a file": (("-o", "tiny.yaml/o.mp4"), "is a file, not a directory"),
    "latents are the output": (("--latents", "o.mp4"), "cannot be one file"),
    "blank prompt": (("--prompt", "  "), "the prompt is empty"),
    "two prompts": (("--prompt-file", "words.txt"), "either --prompt or --prompt-file"),
    "offload without a GPU": (("--offload",), "--device cuda"),
    "frames per second": (("--fps", "0"), "frames per second"),
    "tiles": (("--tile", "onn"), "did you mean 'on'?"),
    "dtype": (("--dtype", "float61"), "did you mean 'float16'?"),
    "another backbone": (
        ("backbone={name: diffusers, model: PixArtTransformer2DModel}",),
        "its backbone is diffusers/",
    ),
    "strides of another VAE": (("backbone={name: wan, strides: [4, 16, 16]}",), "leave backbone.strides out"),
    "steps that do not exist": (("--steps", "2", "steps={2: {'*': {name: full}}}"), "2 steps"),
    "unknown attention": (("attention.*.name=ful",), "did you mean 'full'?"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_cannot_be_made(capsys, place, wan, case):
    (place / "words.txt").write_text("a red ball")
    options, said = OPTIONS[case]
    before = listing(place)
    refused(made(capsys, wan, *options), said)
    assert listing(place) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"\xff\xfe", "is not UTF-8 text"), (None, "cannot be read")],
)
def test_prompt_files(capsys, place, wan, content, said):
    if content is not None:
        (place / "words.txt").write_bytes(content)
    before = listing(place)
    refused(made(capsys, wan, "--prompt-file", "words.txt", prompt=""), "words.txt", said)
    assert listing(place) == before


def test_no_prompt(capsys, place, wan):
    refused(made(capsys, wan, prompt=""), "--prompt-file")
    assert listing(place) == {"tiny.yaml"}


@pytest.mark.parametrize("name", ["o.mp4", "o.latents.safetensors"])
def test_what_exists_is_kept_without_force(capsys, place, wan, name):
    (place / name).write_bytes(b"mine")
    refused(made(capsys, wan), f"{name} exists")
    assert (place / name).read_bytes() == b"mine"
    assert made(capsys, wan, "--force").code == 0
    assert (place / name).stat().st_size > 1000


def test_a_place_that_takes_nothing(capsys, place, wan, monkeypatch):
    closed = place / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() == 0:
        # root may write everywhere
        monkeypatch.setattr("ultrazoo.generate.before.os.access", lambda folder, *_, **__: Path(folder) != closed)
    refused(made(capsys, wan, out="closed/o.mp4"), "permission denied")
    assert listing(place) == {"tiny.yaml", "closed"}


def test_too_little_memory(capsys, place, wan, monkeypatch):
    monkeypatch.setattr("ultrazoo.generate.memory.free_bytes", lambda _: 10_000)
    refused(made(capsys, wan), "10 kB are free", "use a smaller size")
    assert listing(place) == {"tiny.yaml"}


def test_too_little_disk_is_seen_before_sampling(capsys, place, wan, monkeypatch):
    full = shutil.disk_usage(place)._replace(free=20_000)
    monkeypatch.setattr("ultrazoo.generate.before.shutil.disk_usage", lambda _: full)
    refused(made(capsys, wan), "20 kB are free there")
    assert listing(place) == {"tiny.yaml"}


# a run that fails half way


LIMIT_BYTES = 6000


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond 6 kB: enough for latents, too little for a picture."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def again(ran: Ran) -> list[str]:
    """The command that a failed run says to go on with."""
    line = next(line for line in ran.err.splitlines() if "--from-latents" in line)
    return shlex.split(line.partition("go on")[2].partition("ultrazoo ")[2])


def test_a_full_disk_keeps_the_latents(capsys, place):
    folder = pipeline_folder("PixArtSigmaPipeline", place / "pixart")
    before = listing(place)
    asked = ("video.frames=1", "--pipeline", str(folder), "-o", "o.png", "--prompt", "a red ball")
    with small_files():
        ran = here(capsys, "generate", "tiny.yaml", *asked)
    refused(ran, "cannot write o.png: files may not be so large", "the latents are kept; go on with")
    assert listing(place) - before == {"o.latents.safetensors"}
    ran = here(capsys, *again(ran))
    assert ran.code == 0, ran.err
    assert (place / "o.png").stat().st_size > LIMIT_BYTES


def test_a_full_disk_leaves_no_half_of_a_video(place):
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    with small_files(), pytest.raises(OutputError, match=r"cannot write o\.mp4: files may not be so large"):
        write_video(Path("o.mp4"), noise, 16.0, {})
    assert listing(place) == {"tiny.yaml"}
    write_video(Path("o.mp4"), noise, 16.0, {})
    assert (place / "o.mp4").stat().st_size > LIMIT_BYTES


def test_latents_go_elsewhere_when_their_place_takes_none(capsys, place, wan, monkeypatch):
    elsewhere = place / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def check_space(folder: Path, need: int) -> None:
        if elsewhere not in Path(folder).parents:
            raise OutputError(f"{folder} has 0 B free")

    monkeypatch.setattr("ultrazoo.generate.latents.check_space", check_space)
    ran = made(capsys, wan)
    assert ran.code == 0, ran.err
    assert "warning: " in ran.err
    assert "has 0 B free" in ran.err
    (kept,) = elsewhere.rglob("*.safetensors")
    assert f"latents saved elsewhere: {kept}" in ran.err
    assert Latents.load(kept).facts["seed"] == 0


def stopping(of: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`of`, with Ctrl-C at its call number `after`."""
    calls = []

    def interrupted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return of(*arguments, **more)

    return interrupted


def test_interrupted_while_sampling(capsys, place, wan, monkeypatch):
    from diffusers import UniPCMultistepScheduler as Scheduler

    monkeypatch.setattr(Scheduler, "step", stopping(Scheduler.step, after=2))
    refused(made(capsys, wan), "interrupted", code=130)
    assert listing(place) == {"tiny.yaml"}


def test_interrupted_while_decoding(capsys, place, wan, monkeypatch):
    from diffusers import AutoencoderKLWan as Vae

    with monkeypatch.context() as patch:
        patch.setattr(Vae, "decode", stopping(Vae.decode, after=1))
        ran = made(capsys, wan)
    refused(ran, "interrupted", code=130)
    assert listing(place) == {"tiny.yaml", "o.latents.safetensors"}
    assert here(capsys, *again(ran)).code == 0
    assert (place / "o.mp4").is_file()


def test_values_that_are_not_finite(capsys, place, wan, monkeypatch):
    from diffusers import UniPCMultistepScheduler as Scheduler

    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda *a, **k: (step(*a, **k)[0] * float("nan"),))
    refused(made(capsys, wan), "not finite", code=1)
    assert listing(place) == {"tiny.yaml"}


def test_pixels_that_are_not_finite(capsys, place, wan, monkeypatch):
    from diffusers import AutoencoderKLWan as Vae

    decode = Vae.decode
    with monkeypatch.context() as patch:
        patch.setattr(Vae, "decode", lambda *a, **k: (decode(*a, **k)[0] * float("inf"),))
        ran = made(capsys, wan)
    refused(ran, "decoding in float32 gave values that are not finite", code=1)
    assert listing(place) == {"tiny.yaml", "o.latents.safetensors"}
    assert here(capsys, *again(ran), "--dtype", "float32").code == 0
