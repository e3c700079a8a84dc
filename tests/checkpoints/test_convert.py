"""Conversion between the layouts of diffusers, Wan, UltraGen and ours: bit for bit and back, or a table and nothing written."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import ultrazoo
from tests.weights import layouts
from tests.weights.models import PAPER, RELEASED, build_directory, error_ratio, inputs, nothing_in, tiny
from ultrazoo.checkpoints.convert import convert
from ultrazoo.errors import OutputError, UsageError, WeightsError
from ultrazoo.weights import disk
from ultrazoo.weights.infer import infer
from ultrazoo.weights.keymaps import FORMATS
from ultrazoo.weights.reader import Checkpoint
from ultrazoo.weights.tensors import Entry

HEADS = (f"backbone.heads={layouts.HEADS}",)


def stored(path):
    """Every tensor of a checkpoint as it stands in its files."""
    if path.is_file():
        return torch.load(path, weights_only=True) if path.suffix != ".safetensors" else load_file(path)
    found = {}
    for file in path.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def bits(tensors):
    """Key → type, shape and bytes."""
    return {
        key: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, t in tensors.items()
    }


def mixed(shapes, seed=0):
    """Tensors in bf16, modulation and norms in fp32, as training programs keep them."""
    tensors = layouts.tensors(shapes, torch.bfloat16, seed)
    for key in tensors:
        if "modulation" in key or "norm" in key:
            tensors[key] = tensors[key].float() + 2**-20
    return tensors


@pytest.fixture
def wan(tmp_path):
    """Three layers; NaN and -0 among the numbers."""
    tensors = mixed(layouts.wan(3))
    tensors["head.head.bias"][:2] = torch.tensor([-0.0, float("nan")])
    torch.save(tensors, tmp_path / "wan.pth")
    return tmp_path / "wan.pth", tensors


@pytest.fixture
def released(tmp_path):
    """Layers 1 and 2 of four, as a released file has 3 to 26 of 30."""
    tensors = mixed(layouts.ultragen((1, 2), of=4, rank=4))
    torch.save(tensors, tmp_path / "released.ckpt")
    return tmp_path / "released.ckpt", tensors


@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one", "sharded"])
@pytest.mark.parametrize("route", [["diffusers"], ["ultrazoo"], ["diffusers", "ultrazoo", "diffusers"]], ids=str)
def test_wan_there_and_back_keeps_every_bit(tmp_path, wan, route, limit):
    path, tensors = wan
    here = path
    for number, to in enumerate(route):
        convert(here, tmp_path / str(number), to, overrides=HEADS if number == 0 else (), limit=limit)
        here = tmp_path / str(number)
        if to == "diffusers" and limit < 10**9:
            assert (here / "diffusion_pytorch_model.safetensors.index.json").is_file()
            assert len(list(here.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
        # names differ where the layout does, so this is no copy of the file
        assert (set(stored(here)) != set(tensors)) == (to == "diffusers")
    done = convert(here, tmp_path / "back.pth", "wan")
    assert bits(stored(tmp_path / "back.pth")) == bits(tensors)
    assert done.dtypes == ("bfloat16", "float32")
    assert (done.tensors, done.parameters) == (len(tensors), sum(t.numel() for t in tensors.values()))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ""])
def test_released_ultragen_loads_runs_and_comes_back(tmp_path, released, suffix):
    path, tensors = released
    done = convert(
        path, tmp_path / "ours", "ultrazoo", overrides=(*HEADS, "attention.1-2.windows=2", "video.grid=[2,8,9]")
    )
    assert any("windows" in note for note in done.notes)
    model = ultrazoo.from_pretrained(tmp_path / "ours")
    assert [one.name for one in model.plan.resolved.attention] == ["full", "branched", "branched", "full"]
    with torch.no_grad():
        got = model.float()(*inputs())
        # the same weights, loaded by the recipe's own `weights:`
        design = {"0,3": {"name": "full"}, "1-2": {**RELEASED, "full_first": 0}}
        source = {**tiny(weights={"path": str(path)}), "attention": design}
        source["backbone"] = {**source["backbone"], "layers": 4}
        due = ultrazoo.build(source).eval()(*inputs())
    assert error_ratio(got, due) < 1e-5
    assert error_ratio(got * 0.5, due) > 0.1
    convert(tmp_path / "ours", tmp_path / f"back{suffix}", "ultragen")
    back = stored(tmp_path / f"back{suffix}")
    assert bits(back) == bits(tensors)


def test_a_written_ckpt_is_a_plain_zip_of_aligned_storages(tmp_path, wan):
    path, tensors = wan
    convert(path, tmp_path / "x.ckpt", "wan")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert {"archive/data.pkl", "archive/version"} <= set(names)
        raw = (tmp_path / "x.ckpt").read_bytes()
        for info in archive.infolist():
            extra = int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little")
            if "/data/" in info.filename:
                assert (info.header_offset + 30 + len(info.filename) + extra) % 64 == 0
    for mmap in (True, False):
        assert bits(torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=mmap)) == bits(tensors)


def test_diffusers_opens_what_was_converted(tmp_path, caplog):
    from diffusers import WanTransformer3DModel

    save_file(layouts.tensors(layouts.wan()), tmp_path / "wan.safetensors")
    convert(tmp_path / "wan.safetensors", tmp_path / "hub", "diffusers", overrides=HEADS)
    with caplog.at_level("WARNING"):
        model, info = WanTransformer3DModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info.values()), info
    assert "not expected" not in caplog.text
    ours = ultrazoo.build(tiny(weights={"path": str(tmp_path / "wan.safetensors")})).eval()
    latents, timestep, text = inputs()
    with torch.no_grad():
        due = model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        got = ours(latents, timestep, text)
    assert error_ratio(got, due) < 1e-5
    # what diffusers writes is read back with its heads
    model.save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "native", "wan")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert (config["_class_name"], config["num_heads"], config["dim"]) == ("WanModel", layouts.HEADS, layouts.DIM)
    assert bits(stored(tmp_path / "native")) == bits(layouts.tensors(layouts.wan()))


def test_the_released_size_is_known_by_its_shapes(tmp_path):
    model = ultrazoo.build({**tiny(), "backbone": {"name": "wan", "preset": "t2v_1_3b"}}, device="meta")
    entries = {n: Entry(n, tuple(p.shape), torch.bfloat16) for n, p in model.state_dict().items()}
    found = infer(Checkpoint(tmp_path / "Wan2.1.safetensors", [], entries, {}), FORMATS["wan"], "")
    assert found.recipe["backbone"] == {"name": "wan", "preset": "t2v_1_3b"}
    assert found.recipe["dtype"] == "bfloat16"
    assert found.heads_known


@pytest.mark.parametrize("prefix", ["model.", "module.", "model.diffusion_model.", "module.model."])
def test_a_known_prefix_is_taken_off_and_told(tmp_path, prefix):
    tensors = layouts.tensors(layouts.wan())
    save_file({prefix + key: t for key, t in tensors.items()}, tmp_path / "x.safetensors")
    done = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "wan")
    assert done.prefix == prefix
    assert bits(stored(tmp_path / "y.safetensors")) == bits(tensors)


def bad(case, tmp_path):
    """A checkpoint that cannot be converted, what to convert it to, and words of the error."""
    tensors = layouts.tensors(layouts.wan())
    path = tmp_path / "in.safetensors"
    if case == "other model":
        save_file({"conv1.weight": torch.ones(3)}, path)
        return path, "diffusers", "is of no known format"
    if case == "image to video":
        save_file({**tensors, "img_emb.proj.0.weight": torch.ones(3)}, path)
        return path, "diffusers", r"unexpected +img_emb\.proj\.0\.weight +file \(3,\)"
    if case == "half":
        save_file({key: t for key, t in tensors.items() if "blocks.1." not in key or "self_attn" in key}, path)
        return path, "diffusers", r"(?s)nothing was loaded.*missing +blocks\.1\.modulation"
    if case == "shape":
        save_file({**tensors, "blocks.1.ffn.0.bias": torch.ones(7)}, path)
        return path, "diffusers", r"wrong shape +blocks\.1\.ffn\.0\.bias +file \(7,\) +model \(40,\)"
    if case == "type":
        save_file({**tensors, "blocks.1.ffn.0.bias": torch.ones(layouts.FFN).to(torch.float8_e4m3fn)}, path)
        return path, "diffusers", r"wrong type +blocks\.1\.ffn\.0\.bias +file float8_e4m3fn +model float32"
    if case == "unknown prefix":
        save_file({f"net.{key}": t for key, t in tensors.items()}, path)
        return path, "wan", r"every key has the prefix 'net\.', which is none of those taken off \('module\.'"
    if case == "two models":
        both = {**{f"model.{k}": t for k, t in tensors.items()}, **{f"ema.{k}": t.clone() for k, t in tensors.items()}}
        save_file({**both, "step.count": torch.ones(1)}, path)
        return path, "wan", r"stands behind 'ema\.' \(69 tensors\), 'model\.' \(69 tensors\) and 1 others beside: save"
    if case == "missing shard":
        convert(
            _saved(tensors, tmp_path / "src.safetensors"), tmp_path / "sharded", "wan", overrides=HEADS, limit=20_000
        )
        next(iter((tmp_path / "sharded").glob("*-00002-of-*"))).unlink()
        return tmp_path / "sharded", "diffusers", "which is not there"
    if case == "one shard":
        convert(
            _saved(tensors, tmp_path / "src.safetensors"), tmp_path / "sharded", "wan", overrides=HEADS, limit=60_000
        )
        first = next(iter((tmp_path / "sharded").glob("*-00001-of-*")))
        return first, "diffusers", r"missing|is the checkpoint whole|no known format"
    if case == "code":
        torch.save({**tensors, "x": _Evil(tmp_path / "trace")}, tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt", "wan", "holds more than tensors"
    if case == "extras":
        save_file(layouts.tensors(layouts.ultragen((1,), rank=4)), path)
        return path, "wan", r"(?s)no place +blocks\.1\.self_attn\.\S+.*design \{name: ultragen, variant: released\}"
    if case == "torn lora":
        tensors = layouts.tensors(layouts.ultragen((1,), rank=4))
        del tensors["blocks.1.self_attn.k_lora_2.lora_B.bias"]
        save_file(tensors, path)
        return path, "ultrazoo", r"missing +blocks\.1\.self_attn\.k_lora_2\.lora_B\.bias"
    if case == "no extras":
        save_file(tensors, path)
        return path, "ultragen", "has none of the extra weights of the format ultragen.*use --to wan"
    if case == "paper":
        build_directory(tiny(PAPER), tmp_path / "paper")
        return tmp_path / "paper", "ultragen", r"missing +blocks\.0-1\.self_attn\.q_lora_1\.lora_A\.bias"
    raise AssertionError(case)


def _saved(tensors, path):
    save_file(tensors, path)
    return path


class _Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


CASES = ["other model", "image to video", "half", "shape", "type", "unknown prefix", "two models", "missing shard"]
CASES += ["one shard", "code", "extras", "torn lora", "no extras", "paper"]


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told_and_nothing_written(tmp_path, case):
    path, to, words = bad(case, tmp_path)
    (tmp_path / "room").mkdir()
    for out in ("deep/out", "deep/out.safetensors"):
        if to == "ultrazoo" and "." in out:
            continue
        with pytest.raises(WeightsError, match=words) as caught:
            convert(path, tmp_path / "room" / out, to, overrides=HEADS)
        assert caught.value.exit_code == 2
    assert nothing_in(tmp_path / "room")
    assert not (tmp_path / "trace").exists()


def test_gates_of_another_meaning_are_not_called_ultragen(tmp_path):
    """The released parameters under the paper's order of gates: names and shapes fit, their reader would mix otherwise."""
    conv, lora = {"name": "depthwise_conv"}, {"name": "lora", "rank": 4, "bias": True}
    block = {
        "name": "branched",
        "branches": {
            "local": {},
            "regional": {"compress": {**conv, "factor": 2}, "adapt": lora},
            "global": {"compress": {**conv, "factor": 4}, "adapt": lora},
        },
        "fuse": {"name": "time_gate", "order": ["global", ["local", "regional"]]},
    }
    build_directory(tiny(block), tmp_path / "ours")
    with pytest.raises(WeightsError, match="is not the one that the format ultragen stands for") as caught:
        convert(tmp_path / "ours", tmp_path / "x.ckpt", "ultragen")
    text = str(caught.value)
    assert (
        'attention.0-1.branches.global.adapt.key_from   the format means "query", the weights belong to "key"' in text
    )
    assert "attention.0-1.fuse.order" in text
    assert not (tmp_path / "x.ckpt").exists()


def test_heads_that_nobody_tells_are_asked_for(tmp_path, wan):
    path, _ = wan
    for to in ("diffusers", "wan", "ultrazoo"):
        with pytest.raises(WeightsError, match=r"no tensor tells the number of heads.*add backbone\.heads=N"):
            convert(path, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    # a single file has no config: nothing needs them
    convert(path, tmp_path / "out.safetensors", "diffusers")


def test_a_config_of_another_model_is_noticed(tmp_path, wan):
    path, _ = wan
    (path.parent / "config.json").write_text('{"_class_name": "WanModel", "num_heads": 7}')
    with pytest.raises(WeightsError, match=r"its config\.json says 7 heads, the weights are 24 channels wide"):
        convert(path, tmp_path / "out", "diffusers")


def test_existing_places_and_force(tmp_path, wan):
    path, tensors = wan
    for out in ("d", "f.safetensors"):
        convert(path, tmp_path / out, "wan", overrides=HEADS)
        with pytest.raises(OutputError, match="exists; use --force"):
            convert(path, tmp_path / out, "diffusers", overrides=HEADS)
        assert bits(stored(tmp_path / out)) == bits(tensors)
        convert(path, tmp_path / out, "diffusers", overrides=HEADS, force=True)
        assert set(stored(tmp_path / out)) != set(tensors)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="was not written by ultrazoo"):
        convert(path, tmp_path / "mine", "wan", overrides=HEADS, force=True)
    (tmp_path / "x.ckpt").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        convert(path, tmp_path / "x.ckpt", "wan", force=True)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_the_source_is_never_the_target(tmp_path, wan):
    path, tensors = wan
    convert(path, tmp_path / "d", "wan", overrides=HEADS)
    for source, out in ((path, path), (tmp_path / "d", tmp_path / "d")):
        with pytest.raises(UsageError, match="holds the checkpoint that is read"):
            convert(source, out, "diffusers", overrides=HEADS, force=True)
    assert bits(stored(path)) == bits(tensors)


def test_a_full_disk_leaves_nothing(tmp_path, wan, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    for out in ("out", "out.ckpt"):
        with pytest.raises(OutputError, match="has 1 kB free"):
            convert(wan[0], tmp_path / out, "wan", overrides=HEADS)
    assert {one.name for one in tmp_path.iterdir()} == {"wan.pth"}


@pytest.mark.parametrize("out", ["out", "out.ckpt", "out.safetensors"])
def test_interruption_leaves_nothing(tmp_path, wan, out):
    def stop(done, total, key):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(wan[0], tmp_path / out, "wan", overrides=HEADS, progress=stop)
    assert {one.name for one in tmp_path.iterdir()} == {"wan.pth"}


def test_wrong_words(tmp_path, wan):
    with pytest.raises(UsageError, match="did you mean 'diffusers'"):
        convert(wan[0], tmp_path / "x", "difusers")
    with pytest.raises(UsageError, match="is a directory with its recipe"):
        convert(wan[0], tmp_path / "x.safetensors", "ultrazoo")
