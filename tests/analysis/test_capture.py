"""`capture` of models that run: what is written, how much of it, and what happens when it is cut off."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ultrazoo
from tests.analysis.test_probe import MODEL, arguments, shaken
from ultrazoo.analysis.capture_files import Capture
from ultrazoo.attention.contract import grid_positions
from ultrazoo.errors import OutputError, UsageError
from ultrazoo.testing import error_ratio
from ultrazoo.weights.writer import raw

ROOT = Path(__file__).parents[2]
DIT = {
    "name": "image",
    "video": {"grid": [1, 4, 6]},
    "backbone": {
        "name": "dit",
        "dim": 24,
        "layers": 2,
        "heads": 2,
        "classes": 3,
        "latent": {"strides": [1, 1, 1], "channels": 4},
    },
    "attention": {"*": {"name": "full"}},
    "dtype": "float32",
}


def model_of(recipe: Any = MODEL) -> torch.nn.Module:
    return shaken(ultrazoo.build(recipe))


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_what_is_written_is_what_the_softmax_of_the_model_sees(tmp_path, monkeypatch):
    model = model_of()
    seen: list[Any] = []
    host = model.blocks[1].self_attn
    stock = host.heads
    monkeypatch.setattr(host, "heads", lambda *a: seen.append(stock(*a)) or seen[-1])
    given = arguments()
    with torch.no_grad():
        plain = model(*given)
    q, k, v = seen[-1]
    seen.clear()
    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c", layers="1"):
        assert torch.equal(model(*given), plain)
    assert hooks(model) == 0
    held = Capture.load(tmp_path / "c")
    assert held.complete
    (item,) = held.items
    assert (item.layer, tuple(item.grid), item.step, item.segments) == (1, (3, 5, 7), None, ())
    tensors = held.tensors(item)
    for name, due in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(tensors[name], due), name
    assert tensors["timestep"].tolist() == [400.0]
    assert set(tensors) == {"q", "k", "v", "timestep"}
    assert held.models[""].turns
    assert held.models[""].weights == "loaded"
    # the softmax of what is written, through the model's output projection, is the layer's own answer
    own = (held.tensors(item)["q"], held.tensors(item)["k"], held.tensors(item)["v"])
    scores = torch.einsum("bnhd,bmhd->bhnm", own[0].double(), own[1].double()) / 12**0.5
    y = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), own[2].double())
    found: list[torch.Tensor] = []
    monkeypatch.setattr(host, "out", lambda z: found.append(z) or z)
    with torch.no_grad():
        model(*given)
    assert error_ratio(found[0], y.flatten(2).float()) < 1e-5


def test_steps_layers_and_heads_are_those_asked_for(tmp_path):
    model = model_of()
    with torch.no_grad(), ultrazoo.capture(model, tmp_path, layers="0", heads="1", steps=(0, 2)) as recorder:
        for sample in range(2):
            recorder.sample = sample
            for step in range(3):
                model.select(step, 3)
                model(*arguments())
    held = Capture.load(tmp_path)
    assert [(item.sample, item.step) for item in held.items] == [(0, (0, 3)), (0, (2, 3)), (1, (0, 3)), (1, (2, 3))]
    assert held.heads == (1,)
    assert held.tensors(held.items[0])["q"].shape == (1, 105, 1, 12)
    found = ultrazoo.probe([{"name": "w", "attention": {"*": {"name": "swin", "window": [2, 2, 2]}}}], held, steps="2")
    assert len(found.rows[0].points) == 2
    assert len(found.rows[0].points[0].measured.error) == 1


def test_a_dit_is_captured_and_probed(tmp_path):
    model = model_of(DIT)
    with torch.no_grad(), ultrazoo.capture(model, tmp_path, inputs=True):
        model(torch.randn(2, 4, 1, 8, 12), torch.tensor([10.0, 700.0]), torch.tensor([0, 2]))
    held = Capture.load(tmp_path)
    assert [item.batch for item in held.items] == [2, 2]
    assert held.models[""].site.rope is None
    design = {"name": "t", "attention": {"*": {"name": "ultragen", "windows": 2, "rank": 2}}}
    row = ultrazoo.probe([design], held).rows[0]
    assert row.whole, row.lacking


def test_forwards_that_are_cut_off_are_continued_and_nothing_is_lost(tmp_path):
    model = model_of()
    given = arguments()

    def run(upto: int) -> None:
        with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c") as recorder:
            for step in range(upto):
                model.select(step, 4)
                model(*given)
                if upto == 2 and step == 1:
                    raise KeyboardInterrupt
        assert recorder.written == 4

    with pytest.raises(KeyboardInterrupt):
        run(2)
    assert hooks(model) == 0
    held = Capture.load(tmp_path / "c")
    assert not held.complete
    assert len(held.items) == 4
    times = {item.file: (held.directory / item.file).stat().st_mtime_ns for item in held.items}
    run(4)
    held = Capture.load(tmp_path / "c")
    assert held.complete
    assert len(held.items) == 8
    for file, time in times.items():
        assert (held.directory / file).stat().st_mtime_ns == time
    # a file that was damaged meanwhile is made again
    (held.directory / held.items[5].file).write_bytes(b"half")
    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c") as recorder:
        for step in range(4):
            model.select(step, 4)
            model(*given)
    assert recorder.written == 1
    assert len(Capture.load(tmp_path / "c").tensors(held.items[5])["q"]) == 1


def test_a_killed_process_leaves_whole_files_and_an_index(tmp_path):
    """SIGKILL while files are written: what the index names can be read, and the next run goes on."""
    program = (
        "import os, sys, torch, ultrazoo\n"
        "from tests.analysis.test_capture import model_of, arguments\n"
        "model, given = model_of(), arguments()\n"
        "with torch.no_grad(), ultrazoo.capture(model, sys.argv[1]) as recorder:\n"
        "    for step in range(6):\n"
        "        model.select(step, 6)\n"
        "        if step == 3:\n"
        "            import ultrazoo.weights.writer as writer\n"
        "            writer.os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "        model(*given)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], cwd=ROOT, check=False)
    assert done.returncode == -9
    held = Capture.load(tmp_path / "c")
    assert len(held.items) == 6
    assert not held.complete
    assert all(set(held.tensors(item)) >= {"q", "k", "v"} for item in held.items)
    model, given = model_of(), arguments()
    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c") as recorder:
        for step in range(6):
            model.select(step, 6)
            model(*given)
    assert recorder.written == 6
    held = Capture.load(tmp_path / "c")
    assert len(held.items) == 12
    assert held.complete
    # what the killed run was writing is gone
    assert {file.name for file in held.directory.iterdir()} == {"capture.json", *(item.file for item in held.items)}


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path, monkeypatch):
    model = model_of()
    given = arguments()
    # four tensors a file: the third file's second tensor finds no room
    monkeypatch.setattr("ultrazoo.weights.writer.raw", _after(9, OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="the disk is full"):
        record(model, given, tmp_path / "c")
    held = Capture.load(tmp_path / "c")
    assert len(held.items) == 2
    assert not held.complete
    assert all(held.tensors(item) for item in held.items)
    assert {file.name for file in held.directory.iterdir()} == {"capture.json", *(item.file for item in held.items)}


def record(model: torch.nn.Module, given: Any, place: Path, times: int = 3, **more: Any) -> None:
    with torch.no_grad(), ultrazoo.capture(model, place, **more):
        for _ in range(times):
            model(*given)


def _after(count: int, error: OSError) -> Any:
    left = [count]

    def failing(tensor: torch.Tensor) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return raw(tensor)

    return failing


def test_the_limit_is_kept_and_can_be_raised(tmp_path):
    model = model_of()
    given = arguments()
    one = 3 * 105 * 24 * 4
    with pytest.raises(UsageError, match=r"more than the limit of 70 kB\. What is there is whole"):
        record(model, given, tmp_path / "c", limit=70_000)
    held = Capture.load(tmp_path / "c")
    assert held.nbytes <= 70_000 < held.nbytes + one
    record(model, given, tmp_path / "c", limit=10**6)
    assert len(Capture.load(tmp_path / "c").items) == 6


def test_projections_count_towards_the_limit(tmp_path):
    model = model_of()
    given = arguments()
    record(model, given, tmp_path / "c", times=1, layers="0", inputs=True)
    held = Capture.load(tmp_path / "c")
    on_disk = sum(file.stat().st_size for file in held.directory.glob("*.safetensors"))
    assert held.nbytes == on_disk > sum(item.nbytes for item in held.items) + 3 * 24 * 24 * 4
    with pytest.raises(UsageError, match="more than the limit"):
        record(model, given, tmp_path / "d", times=1, layers="0", inputs=True, limit=held.items[0].nbytes)
    assert not (tmp_path / "d").exists()


def test_projections_that_are_gone_are_made_again(tmp_path):
    model = model_of()
    given = arguments()
    record(model, given, tmp_path / "c", times=2, inputs=True)
    held = Capture.load(tmp_path / "c")
    gone = held.directory / held.hosts["model-l001"]
    whole = gone.read_bytes()
    gone.unlink()
    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c", inputs=True) as recorder:
        for _ in range(2):
            model(*given)
    assert gone.read_bytes() == whole
    assert recorder.written == 2


def test_other_requests_models_and_places_are_refused(tmp_path):
    model = model_of()

    def enter(built: torch.nn.Module, place: Path = tmp_path / "c", **more: Any) -> Any:
        return contextlib.ExitStack().enter_context(ultrazoo.capture(built, place, **more))

    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c", layers="0"):
        model(*arguments())
    with pytest.raises(OutputError, match=r"another capture: layers was '0', asked for is '1'"):
        enter(model, layers="1")
    other = model_of({**MODEL, "backbone": {**MODEL["backbone"], "heads": 4}})
    with pytest.raises(OutputError, match="another model"):
        enter(other, layers="0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists and holds no capture"):
        enter(model, tmp_path / "full")
    with pytest.raises(OutputError, match="exists and holds no capture"):
        enter(model, tmp_path / "full" / "letter.txt")
    with pytest.raises(UsageError, match="layer 2 does not exist"):
        enter(model, tmp_path / "d", layers="2")
    with pytest.raises(UsageError, match="head 2 does not exist"):
        enter(model, tmp_path / "d", heads="2")
    with pytest.raises(UsageError, match="of all heads at once"):
        enter(model, tmp_path / "d", heads="0", inputs=True)
    with pytest.raises(UsageError):
        enter(torch.nn.Linear(2, 2), tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert hooks(model) == 0


def test_random_numbers_are_known_as_such(tmp_path):
    model = ultrazoo.build(MODEL).eval()
    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "c"):
        model(*arguments())
    assert Capture.load(tmp_path / "c").models[""].weights == "random"
    with pytest.raises(UsageError, match="random numbers that its seed gives"):
        ultrazoo.probe([{"name": "x", "attention": {"*": {"name": "full"}}}], tmp_path / "c")
    with torch.no_grad():
        model.blocks[0].self_attn.q.weight.mul_(1.01)
        model.text_embedding[0].weight.mul_(1.01)
    with torch.no_grad(), ultrazoo.capture(model, tmp_path / "d"):
        model(*arguments())
    assert Capture.load(tmp_path / "d").models[""].weights == "loaded"


def test_how_the_model_turns_is_checked_against_the_model(tmp_path, monkeypatch):
    model = model_of()
    monkeypatch.setattr(model.blocks[0].self_attn, "rope", replace(model.blocks[0].self_attn.rope, base=100.0))
    with torch.no_grad(), ultrazoo.capture(model, tmp_path, layers="0"):
        model(*arguments())
    assert not Capture.load(tmp_path).models[""].turns


def test_a_model_of_diffusers_is_captured_and_left_as_it_was(tmp_path):
    from diffusers import FluxTransformer2DModel, WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
    ).eval()
    stock = [type(block.attn1.processor) for block in model.blocks]
    x, t, text = arguments()
    with torch.no_grad():
        plain = model(x, t.long(), text).sample
        with ultrazoo.capture(model, tmp_path / "c", inputs=True):
            running = model(x, t.long(), text).sample
    assert error_ratio(running, plain) < 1e-5
    assert [type(block.attn1.processor) for block in model.blocks] == stock
    held = Capture.load(tmp_path / "c")
    assert held.models[""].backbone == "diffusers/WanTransformer3DModel"
    assert held.models[""].turns
    assert len(held.hosts) == 2
    # a module of its own kind of projections and norms, through the numbers that were kept
    item = held.items[1]
    tensors, (weights, notes) = held.tensors(item), held.host("", 1)
    attn = model.blocks[1].attn1
    with torch.no_grad():
        raw = tensors["x"] @ weights["q.weight"].T + weights["q.bias"]
        assert error_ratio(raw, attn.to_q(tensors["x"])) < 1e-5
    assert notes["norm_q"] == "rms of all heads"
    assert grid_positions((3, 5, 7)).t.numel() == item.grid.t
    with (
        pytest.raises(UsageError, match="FluxTransformer2DModel"),
        ultrazoo.capture(
            FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=1,
                joint_attention_dim=8,
                pooled_projection_dim=8,
                axes_dims_rope=(2, 2, 4),
            ),
            tmp_path / "d",
        ),
    ):
        pass


def test_an_index_survives_a_round_trip(tmp_path):
    with torch.no_grad(), ultrazoo.capture(model_of(), tmp_path) as recorder:
        recorder.models[""](*arguments())
    held = Capture.load(tmp_path)
    assert held == replace(recorder.capture, directory=held.directory)
    assert json.loads((tmp_path / "capture.json").read_text())["ultrazoo_capture"] == 1
