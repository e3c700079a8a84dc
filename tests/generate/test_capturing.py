"""`ultrazoo capture` on tiny pipelines in the real layout, as it is typed: what it writes, goes on with and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ultrazoo
from tests.cli.program import here
from tests.generate.tiny_pipelines import pipeline_folder, wan
from ultrazoo.analysis.capture_files import Capture
from ultrazoo.errors import OutputError, UltrazooError
from ultrazoo.generate import capturing
from ultrazoo.generate.capturing import CaptureWanted, capture_pipeline, prompts_in
from ultrazoo.generate.families import BY_PIPELINE
from ultrazoo.testing import error_ratio

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ("a red ball rolls over the sea", "the blue cube")
WINDOWS = {"name": "windows", "attention": {"*": {"name": "swin", "window": [1, 2, 2]}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return pipeline_folder("WanPipeline", tmp_path_factory.mktemp("pipelines") / "WanPipeline")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def quiet(_: str) -> None:
    pass


def wanted(place: Path, **more: Any) -> CaptureWanted:
    given = {
        "width": 64,
        "height": 64,
        "frames": 9,
        "sampling_steps": 3,
        "steps": "0,2",
        "layers": "0-1",
        "dtype": "float32",
    }
    return CaptureWanted(out=place, **{"prompts": PROMPTS, **given, **more})


def test_prompts_steps_and_layers_are_written_and_probed(folder, prompts, tmp_path, capsys):
    line = ["capture", folder, "--prompts", prompts, "-o", tmp_path / "c", "--size", "64x64", "--frames", 9]
    line += ["--sampling-steps", 3, "--steps", "0,2", "--layers", "0-1", "--dtype", "float32", "--guidance", 4]
    ran = here(capsys, *line, "--json")
    assert ran.code == 0, ran.err
    assert "8 files, about" in ran.err
    told = json.loads(ran.out)
    assert told["files"] == 8
    assert told["complete"] is True
    held = Capture.load(tmp_path / "c")
    assert [(item.sample, item.step, item.layer) for item in held.items] == [
        (sample, (step, 3), layer) for sample in (0, 1) for step in (0, 2) for layer in (0, 1)
    ]
    assert told["bytes"] == held.nbytes
    estimated = float(re.search(r"about ([\d.]+) kB", ran.err)[1]) * 1000  # type: ignore[index]
    assert held.nbytes <= estimated <= 1.3 * held.nbytes
    assert tuple(held.items[0].grid) == (3, 4, 4)
    assert not torch.equal(held.tensors(held.items[0])["q"], held.tensors(held.items[4])["q"])
    again = here(capsys, *line)
    assert again.code == 0
    assert "nothing to do" in again.err
    (tmp_path / "mine.json").write_text(json.dumps(WINDOWS))
    ran = here(capsys, "probe", tmp_path / "mine.json", "--capture", tmp_path / "c", "--json")
    assert ran.code == 0, ran.err
    row = json.loads(ran.out)["recipes"][0]
    assert len(row["items"]) == 8
    assert row["error"] > 0.1
    ran = here(capsys, "probe", tmp_path / "mine.json", "--capture", tmp_path / "c", "--steps", "2", "--detail")
    assert ran.code == 0
    assert ran.out.count("branched") == 2 * 2 * 2


def test_capturing_changes_nothing_of_what_the_pipeline_does(folder, tmp_path):
    """The last step of a run that recorded everything before is the step of a run that recorded nothing else."""
    every = capture_pipeline(folder, wanted(tmp_path / "all", steps="*", layers="*"), say=quiet)
    last = capture_pipeline(folder, wanted(tmp_path / "last", steps="2", layers="2"), say=quiet)
    (one,) = (item for item in last.items if item.sample == 1)
    same = next(item for item in every.items if item.file == one.file)
    for name, tensor in last.tensors(one).items():
        assert torch.equal(tensor, every.tensors(same)[name]), name


def test_a_run_that_was_cut_off_goes_on(folder, tmp_path, monkeypatch):
    stock, calls = capturing._sample, []

    def failing(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        stock(*given)

    monkeypatch.setattr(capturing, "_sample", failing)
    with pytest.raises(KeyboardInterrupt):
        capture_pipeline(folder, wanted(tmp_path / "c"), say=quiet)
    assert len(Capture.load(tmp_path / "c").items) == 4
    said: list[str] = []
    held = capture_pipeline(folder, wanted(tmp_path / "c"), say=said.append)
    assert held.complete
    assert len(held.items) == 8
    assert len(calls) == 3
    assert "prompt 1 of 2 is there" in said
    whole = capture_pipeline(folder, wanted(tmp_path / "d"), say=quiet)
    for a, b in zip(held.items, whole.items, strict=True):
        assert torch.equal(held.tensors(a)["k"], whole.tensors(b)["k"])


def test_a_capture_is_of_one_transformer(folder, tmp_path):
    """Of another training of the same class and sizes, nothing is added, and what is there is not taken for it."""
    torch.manual_seed(1)
    wan(tmp_path / "other")
    asked = wanted(tmp_path / "c", steps="0", layers="0")
    capture_pipeline(folder, asked, say=quiet)
    shutil.copytree(folder, tmp_path / "moved")
    said: list[str] = []
    capture_pipeline(tmp_path / "moved", asked, say=said.append)
    assert "nothing to do" in said[-1]
    with pytest.raises(OutputError, match="another capture: transformer was"):
        capture_pipeline(tmp_path / "other", asked, say=quiet)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": 10_000}, r"comes to about .* in 8 files, the limit is 10 kB"),
        ({"layers": "5"}, "layer 5 does not exist"),
        ({"heads": "9"}, "head 9 does not exist"),
        ({"steps": "7"}, "step 7 does not exist"),
        ({"width": 60}, "video.width"),
        ({"prompts": ()}, "no prompt"),
        ({"offload": True}, "add --device cuda"),
        ({"inputs": True, "heads": "0"}, "of all heads at once"),
    ],
)
def test_what_cannot_be_captured_is_told_before_anything_runs(folder, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(capturing, "_sample", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UltrazooError, match=said):
        capture_pipeline(folder, wanted(tmp_path / "c", **change), say=quiet)
    assert not (tmp_path / "c").exists()


def test_places_without_room_or_with_something_else_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "_sample", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UltrazooError, match="is a file, not a directory"):
        capture_pipeline(folder, wanted(tmp_path / "file"), say=quiet)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("x")
    with pytest.raises(UltrazooError, match="exists and holds no capture"):
        capture_pipeline(folder, wanted(tmp_path / "taken"), say=quiet)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("ultrazoo.weights.disk.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UltrazooError, match=r"1 kB free, .* are needed"):
        capture_pipeline(folder, wanted(tmp_path / "c"), say=quiet)


def test_bad_lines_are_usage_errors(folder, prompts, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n  \n")
    common = ["capture", folder, "-o", tmp_path / "c", "--size", "64x64", "--prompts"]
    for line, said in (
        ([*common, tmp_path / "empty.txt"], "is empty"),
        ([*common, tmp_path / "none.txt"], "cannot be read"),
        ([*common, prompts, "--limit", "many"], "--limit is a number of bytes"),
        ([*common, prompts, "--dtype", "float23"], "did you mean 'float32'"),
        (
            ["capture", tmp_path, "-o", tmp_path / "c", "--size", "64x64", "--prompts", prompts],
            "not a pipeline's folder",
        ),
        (["capture", folder, "-o", tmp_path / "c", "--size", "64", "--prompts", prompts], "WIDTHxHEIGHT"),
        (["probe", tmp_path / "empty.txt"], "nothing is ranked without a capture"),
        (["probe", "swin_tiny", "--capture", "shapes", "--dtype", "int8"], "--dtype is one of"),
        (["probe", "swin_tiny", "--capture", "shapes"], "is for another model than the captured Wan"),
        (["probe", "--capture", "shapes"], "missing argument 'RECIPE"),
        (["probe", "backbone=null", "--capture", "shapes"], "probe needs a recipe"),
    ):
        ran = here(capsys, *line)
        assert ran.code == 2, line
        assert said in ran.err
    assert not (tmp_path / "c").exists()


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p").write_text(" one \n\ntwo\n")
    assert prompts_in(tmp_path / "p") == ("one", "two")


def test_two_experts_share_the_steps_of_a_capture(tmp_path):
    wan(tmp_path / "experts", experts=2)
    held = capture_pipeline(
        tmp_path / "experts", wanted(tmp_path / "c", steps="*", layers="0", sampling_steps=4), say=quiet
    )
    assert held.complete
    assert len(held.items) == 8
    assert {item.component for item in held.items} == {"transformer", "transformer_2"}
    assert held.models["transformer_2"].turns
    # the early steps are the first one's
    assert held.items[0].component == "transformer"
    assert ultrazoo.probe([WINDOWS], held).rows[0].whole


FAMILIES = {
    "PixArtSigmaPipeline": (),
    "Flux2Pipeline": ("text",),
    "Flux2KleinPipeline": ("text",),
    "QwenImagePipeline": ("text",),
    "HunyuanVideo15Pipeline": ("text",),
    "LTX2Pipeline": (),
    "MiniMaxH3ModularPipeline": ("text", "audio"),
}
"""Kinds of tokens beside the grid."""


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_with_tokens_beside_the_grid_and_doubled_batches(name, tmp_path, capfd):
    folder = pipeline_folder(name, tmp_path / name)
    frames = 124 if "H3" in name else 1 if BY_PIPELINE[name].kind == "image" else 9
    guidance = None if "H3" in name else 3.0
    capfd.readouterr()
    held = capture_pipeline(
        folder,
        wanted(tmp_path / "c", frames=frames, steps="1", layers="first1", guidance=guidance, inputs=True),
        say=quiet,
    )
    assert capfd.readouterr() == ("", "")
    assert {item.batch for item in held.items} == {1}
    assert len(held.items) == 2
    assert len(held.hosts) == 1
    full = {"name": "full", "attention": {"*": {"name": "full"}}}
    found = {row.name: row for row in ultrazoo.probe([full, WINDOWS], held).rows}
    assert found["full"].error < 1e-5
    assert found["full"].recall == pytest.approx(1, abs=1e-4)
    assert found["windows"].error > 0.01
    assert tuple(segment.kind for segment in held.items[0].segments) == FAMILIES[name]


@pytest.mark.parametrize(
    "name",
    [
        "WanPipeline",
        "HunyuanVideo15Pipeline",
        "LTX2Pipeline",
        "QwenImagePipeline",
        "Flux2KleinPipeline",
        "PixArtSigmaPipeline",
    ],
)
def test_with_guidance_the_forward_of_the_prompt_is_kept(name, tmp_path):
    """At the first step, which guidance does not reach yet, it is what a run without guidance captures."""
    folder = pipeline_folder(name, tmp_path / name)
    frames = 1 if BY_PIPELINE[name].kind == "image" else 9
    # the first layer of a model with cross-attention does not know the prompt yet
    asked = {"frames": frames, "steps": "0", "layers": "1"}
    plain, guided = (
        capture_pipeline(folder, wanted(tmp_path / f"at{scale:g}", guidance=scale, **asked), say=quiet)
        for scale in (1.0, 4.0)
    )
    other = capture_pipeline(folder, wanted(tmp_path / "other", guidance=1.0, prompts=PROMPTS[1:], **asked), say=quiet)
    due = plain.tensors(plain.items[0])["q"]
    assert error_ratio(guided.tensors(guided.items[0])["q"], due) < 1e-5
    assert error_ratio(other.tensors(other.items[0])["q"], due) > 1e-3
