"""From a recipe to a model, to a directory and back, on disks that may be full and processes that may be stopped."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ultrazoo
from tests.weights.models import PAPER, RELEASED, build_directory, inputs, nothing_in, same, tiny
from ultrazoo import assemble, recipe
from ultrazoo.errors import OutputError, UltrazooError, UsageError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("attention", ["full", PAPER, RELEASED])
def test_a_built_model_runs_and_carries_its_plan(attention):
    model = ultrazoo.build(tiny(attention))
    plan = ultrazoo.plan(tiny(attention))
    assert model.plan.hash == plan.hash
    assert sum(p.numel() for p in model.parameters()) == plan.totals.parameters
    assert model.origin == {"seed": 0, "weights": None}
    latents, timestep, text = inputs()
    # the way out starts at zero, as in the original
    torch.nn.init.normal_(model.head.head.weight)
    out = model(latents, timestep, text)
    assert out.shape == latents.shape
    assert bool(out.isfinite().all())
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_overrides_and_dtype_are_in_the_plan():
    model = ultrazoo.build(tiny(), "seed=3", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.plan.resolved.dtype == "bfloat16"
    assert model.plan.resolved.seed == 3
    assert model.plan.hash != ultrazoo.plan(tiny()).hash
    for source in (model.plan, model.plan.resolved, recipe.load(tiny())):
        assert ultrazoo.build(source, "seed=3", dtype="bfloat16").plan.resolved.seed == 3
    with pytest.raises(UsageError, match=r"dtype is one of .* got 'int8'"):
        ultrazoo.build(tiny(), dtype=torch.int8)


def test_meta_allocates_nothing_and_opens_nothing(tmp_path):
    model = ultrazoo.build(tiny(PAPER, dtype="bfloat16", weights={"path": str(tmp_path / "absent")}), device="meta")
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    with pytest.raises(UsageError, match="on the meta device: it has no numbers"):
        ultrazoo.save(model, tmp_path / "out")
    assert nothing_in(tmp_path)


def test_a_cost_that_miscounts_is_caught(monkeypatch):
    plan = ultrazoo.plan(tiny())
    totals = type(plan).totals.fget(plan)
    monkeypatch.setattr(type(plan), "totals", property(lambda _: totals.__class__(**{**vars(totals), "parameters": 7})))
    with pytest.raises(UltrazooError, match=r"says 7 parameters, the model has \d+: the cost of backbone 'wan'"):
        ultrazoo.build(plan)


def test_changing_one_layer_leaves_all_else():
    base = dict(ultrazoo.build(tiny()).named_parameters())
    other = dict(ultrazoo.build(tiny() | {"attention": {"*": "full", "1": PAPER}}).named_parameters())
    assert len(other) > len(base)
    assert same(base, {name: other[name] for name in base})


def test_steps_hold_their_alternatives(tmp_path):
    source = tiny(PAPER, sampling={"steps": 4}, steps={"0-1": {"*": {"name": "full"}}})
    model = ultrazoo.build(source)
    model.select(0, 4)
    build_directory(source, tmp_path / "out")
    again = ultrazoo.from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), model.state_dict())


# --- directories --------------------------------------------------------------------------------------------------------


def test_what_a_directory_holds(tmp_path):
    seen = []
    extra = {"README.md": lambda: b"# card", "report.html": lambda: b"<html>"}
    out = tmp_path / "out"
    build_directory(tiny(PAPER, dtype="bfloat16"), out, extra_files=extra, progress=lambda *row: seen.append(row))
    names = {path.name for path in out.iterdir()}
    assert names == {"recipe.yaml", "plan.json", "config.json", "model.safetensors", "README.md", "report.html"}
    assert (out / "README.md").read_bytes() == b"# card"
    plan = ultrazoo.plan(tiny(PAPER, dtype="bfloat16"))
    with safe_open(out / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert file.metadata()["recipe_hash"] == plan.hash
    # to the number
    assert count == plan.totals.parameters == json.loads((out / "plan.json").read_text())["totals"]["parameters"]
    assert seen[-1][:2] == (plan.totals.weight_bytes, plan.totals.weight_bytes)
    assert ultrazoo.plan(out / "recipe.yaml").hash == plan.hash
    config = json.loads((out / "config.json").read_text())
    assert config["hash"] == plan.hash
    assert config["weights"]["parameters"] == count
    assert config["weights"]["files"][0]["bytes"] == (out / "model.safetensors").stat().st_size
    assert config["origin"] == {"seed": 0, "weights": None}


def test_streaming_writes_what_building_makes(tmp_path):
    build_directory(tiny(PAPER), tmp_path / "out")
    model = ultrazoo.build(tiny(PAPER))
    assert same(sorted(load_file(tmp_path / "out" / "model.safetensors").items()), sorted(model.state_dict().items()))
    ultrazoo.save(model, tmp_path / "saved")
    for name in ("model.safetensors", "config.json", "plan.json", "recipe.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(tmp_path, dtype):
    model = ultrazoo.build(tiny(PAPER, dtype=dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        # types may be mixed, and need not be the recipe's
        model.blocks[0].norm3.double()
    ultrazoo.save(model, tmp_path / "out")
    again = ultrazoo.from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), model.state_dict())
    assert again.plan.hash == model.plan.hash
    assert not again.training
    ultrazoo.save(again, tmp_path / "twice")
    first, second = ((tmp_path / name / "config.json").read_bytes() for name in ("out", "twice"))
    assert first == second
    wide = ultrazoo.from_pretrained(tmp_path / "out", dtype="float64")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert wide.plan.resolved.dtype == "float64"


def test_round_trip_through_shards(tmp_path, monkeypatch):
    limited = functools.partial(assemble.write_checkpoint, limit=20_000)
    monkeypatch.setattr(assemble, "write_checkpoint", limited)
    model = ultrazoo.build(tiny(PAPER))
    ultrazoo.save(model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    again = ultrazoo.from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), model.state_dict())


def test_a_loaded_model_does_not_live_in_the_file(tmp_path):
    ultrazoo.save(ultrazoo.build(tiny()), tmp_path / "out")
    model = ultrazoo.from_pretrained(tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "out" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    assert same(model.state_dict(), before)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = ultrazoo.build(tiny())
    ultrazoo.save(torch.compile(model), tmp_path / "out")
    assert same(ultrazoo.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())


def test_only_whole_models_of_ours_are_saved(tmp_path):
    with pytest.raises(UsageError, match="has no plan"):
        ultrazoo.save(torch.nn.Linear(2, 2), tmp_path / "out")
    model = ultrazoo.build(tiny())
    model.blocks[1].self_attn.q = torch.nn.Sequential(model.blocks[1].self_attn.q, torch.nn.Linear(24, 24))
    with pytest.raises(UsageError, match=r"not those of its plan: blocks\.1\.self_attn\.q\.0\.bias.*merge or remove"):
        ultrazoo.save(model, tmp_path / "out")
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.png", "../x", "plan.json"])
def test_extra_files_cannot_replace_ours(tmp_path, name):
    with pytest.raises(OutputError, match="cannot be added"):
        build_directory(tiny(), tmp_path / "out", extra_files={name: lambda: b""})
    assert nothing_in(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    from ultrazoo.weights import disk, writer

    real = writer.write_file

    def full(path, entries, tensors, **options):
        real(path, entries[:3], tensors, **options)
        raise OutputError(disk.explain(path, OSError(errno.ENOSPC, "No space left on device")))

    monkeypatch.setattr(writer, "write_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        build_directory(tiny(), tmp_path / "a" / "out")
    assert nothing_in(tmp_path)


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_directory(tiny(), tmp_path / "out", progress=interrupt)
    assert nothing_in(tmp_path)


def test_force_replaces_a_build_and_a_failure_keeps_it(tmp_path):
    build_directory(tiny(), tmp_path / "out")
    with pytest.raises(OutputError, match="use --force"):
        build_directory(tiny(PAPER), tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        build_directory(tiny(PAPER), tmp_path / "out", force=True, progress=lambda *_: 1 // 0)
    assert ultrazoo.from_pretrained(tmp_path / "out").plan.hash == ultrazoo.plan(tiny()).hash
    build_directory(tiny(PAPER), tmp_path / "out", force=True)
    assert ultrazoo.from_pretrained(tmp_path / "out").plan.hash == ultrazoo.plan(tiny(PAPER)).hash
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


MEASURED = """
import json, sys
import ultrazoo
from ultrazoo import assemble
def anonymous():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows["RssAnon"].split()[0]) * 1024
plan = ultrazoo.plan(json.loads(sys.argv[1]))
assemble.skeleton(plan)
before, most = anonymous(), 0
def watch(*_):
    global most
    most = max(most, anonymous())
assemble.build_directory(plan, sys.argv[2], progress=watch)
print(json.dumps({"weights": plan.totals.weight_bytes, "grown": most - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_memory_of_a_build_is_a_few_tensors(tmp_path):
    wide = tiny("full")
    wide["backbone"] |= {"dim": 768, "ffn_dim": 3072, "layers": 8}
    command = [sys.executable, "-c", MEASURED, json.dumps(wide), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row["weights"] > 300e6
    # the largest tensor is 9 MB: a model in memory, or half of one, would show
    assert row["grown"] < 0.4 * row["weights"]
