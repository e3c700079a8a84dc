"""`ultrazoo check --weights`: digests, layout, types, what fits; exit 3 when it does not hold."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

import ultrazoo
from tests.cli.program import here
from tests.weights import layouts
from tests.weights.models import RELEASED, tiny
from ultrazoo.assemble import skeleton
from ultrazoo.checkpoints.convert import convert
from ultrazoo.checkpoints.verify import verify
from ultrazoo.errors import WeightsError
from ultrazoo.weights.infer import infer
from ultrazoo.weights.match import detect, match
from ultrazoo.weights.reader import Checkpoint
from ultrazoo.weights.slots import slots_of
from ultrazoo.weights.tensors import Entry

HEADS = (f"backbone.heads={layouts.HEADS}",)


@pytest.fixture
def released(tmp_path):
    """A tiny released file, and the recipe of its design."""
    tensors = layouts.tensors(layouts.ultragen((1,), rank=4), torch.bfloat16)
    tensors["head.modulation"] = tensors["head.modulation"].float()
    torch.save(tensors, tmp_path / "released.ckpt")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny(RELEASED)))
    return tmp_path / "released.ckpt", tensors


def test_facts_of_a_released_file(capsys, tmp_path, released):
    path, tensors = released
    ran = here(capsys, "check", "--weights", path, tmp_path / "r.yaml", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["files"] == [
        {
            "file": "released.ckpt",
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    ]
    assert (told["format"], told["fits"], told["new"], told["dropped"]) == ("ultragen", True, [], [])
    assert told["reused"] == told["tensors"] == len(tensors)
    total = sum(t.numel() for t in tensors.values())
    assert told["parameters"] == total
    assert told["dtypes"] == {"bfloat16": total - 2 * layouts.DIM, "float32": 2 * layouts.DIM}
    text = here(capsys, "check", "--weights", path).out
    assert f"sha256 {told['files'][0]['sha256']}" in text
    assert "format ultragen" in text
    assert "fits released (wan): 113 tensors have their place" in text
    assert "note: no tensor tells how many windows" in text


def test_the_digest_of_tensors_is_the_same_in_every_layout(tmp_path, released):
    path, tensors = released
    due = verify(path).tensors_sha256
    convert(path, tmp_path / "ours", "ultrazoo", overrides=HEADS)
    convert(tmp_path / "ours", tmp_path / "sharded", "ultragen", limit=30_000)
    for place in ("ours", "sharded"):
        found = verify(tmp_path / place)
        assert found.fits
        assert found.tensors_sha256 == due
    assert len(found.files) > 2
    # one changed bit, one changed type, one changed name: another digest
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed["head.head.bias"].view(torch.int16)[0] ^= 1
    others = [changed, {**tensors, "head.head.bias": tensors["head.head.bias"].float()}]
    q, k = "blocks.0.self_attn.q.bias", "blocks.0.self_attn.k.bias"
    others.append({**tensors, q: tensors[k], k: tensors[q]})
    for number, other in enumerate(others):
        save_file(other, tmp_path / f"{number}.safetensors")
        assert verify(tmp_path / f"{number}.safetensors").tensors_sha256 != due


def test_a_digest_that_was_published(capsys, released):
    path, _ = released
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert here(capsys, "check", "--weights", path, "--digest", right.upper()).code == 0
    assert here(capsys, "check", "--weights", path, "--digest", verify(path).tensors_sha256).code == 0
    ran = here(capsys, "check", "--weights", path, "--digest", "0" * 64)
    assert ran.code == 3
    assert "is none of the above" in ran.out
    ran = here(capsys, "check", "--weights", path, "--digest", "abc")
    assert ran.code == 2
    assert "64 hexadecimal digits" in ran.err


def test_what_does_not_fit_the_recipe(capsys, tmp_path, released):
    path, _ = released
    ran = here(capsys, "check", "--weights", path, tmp_path / "r.yaml", "backbone.ffn_dim=48")
    assert ran.code == 3
    assert "blocks.0-1.ffn.0.weight  file (40, 24)  model (48, 24)" in ran.out
    assert "format ultragen" in ran.out
    told = json.loads(here(capsys, "check", "--weights", path, tmp_path / "r.yaml", "backbone.layers=3", "--json").out)
    assert not told["fits"]
    assert "missing" in told["problem"]
    # pretrained weights into a new design: fits, and what is new is told
    torch.save(layouts.tensors(layouts.wan()), tmp_path / "wan.pth")
    ran = here(capsys, "check", "--weights", tmp_path / "wan.pth", tmp_path / "r.yaml")
    assert ran.code == 0
    assert "new       blocks.1.attention.branches.regional.compress.conv.weight" in ran.out


def test_weights_that_the_recipe_would_misread(capsys, tmp_path, released):
    path, _ = released
    lora = {"name": "lora", "rank": 4, "bias": True}
    conv = {"name": "depthwise_conv"}
    branches = {
        "local": {},
        "regional": {"compress": {**conv, "factor": 2}, "adapt": lora},
        "global": {"compress": {**conv, "factor": 4}, "adapt": {**lora, "key_from": "query"}},
    }
    fuse = {"name": "time_gate", "order": ["global", ["local", "regional"]]}
    design = {"0": {"name": "full"}, "1": {"name": "branched", "branches": branches, "fuse": fuse}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**tiny(), "attention": design}))
    ran = here(capsys, "check", "--weights", path, tmp_path / "other.yaml")
    assert ran.code == 3
    assert "would misread" in ran.out


def test_half_a_checkpoint_is_not_whole(capsys, tmp_path):
    tensors = layouts.tensors(layouts.wan(3))
    del tensors["blocks.1.modulation"]
    save_file(tensors, tmp_path / "x.safetensors")
    ran = here(capsys, "check", "--weights", tmp_path / "x.safetensors")
    assert ran.code == 3
    assert "missing  blocks.1.modulation" in ran.out


def test_unknown_layouts_still_have_digests(capsys, tmp_path):
    save_file({"conv.weight": torch.ones(3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    ran = here(capsys, "check", "--weights", tmp_path / "x.safetensors", "--json")
    assert ran.code == 3
    told = json.loads(ran.out)
    assert (told["format"], told["fits"], told["dtypes"]) == (None, False, {"int8": 3})
    assert told["files"][0]["sha256"] == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_what_cannot_be_opened(capsys, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    for path, words in ((tmp_path / "x.safetensors", "damaged"), (tmp_path / "absent", "no such file")):
        ran = here(capsys, "check", "--weights", path)
        assert (ran.code, ran.out) == (2, "")
        assert words in ran.err
    ran = here(capsys, "check", "--digest", "0" * 64)
    assert ran.code == 2
    assert "goes with --weights" in ran.err
    assert here(capsys, "check").code == 2


def test_our_own_directory(capsys, tmp_path):
    ultrazoo.save(ultrazoo.build(tiny()), tmp_path / "d")
    ran = here(capsys, "check", "--weights", tmp_path / "d")
    assert ran.code == 0
    assert "format ultrazoo" in ran.out
    assert "fits tiny (wan)" in ran.out


def test_a_released_file_of_full_size_fits_its_recipe_by_every_name_and_shape(tmp_path, monkeypatch):
    """The released layout of the 1.3B model, layers 3 to 26 sparse: facts of tensors, no tensors."""
    for name, size in {"FFN": 8960, "TEXT": 4096, "TIME": 256, "CHANNELS": 16}.items():
        monkeypatch.setattr(layouts, name, size)
    shapes = layouts.ultragen(range(3, 27), of=30, dim=1536, rank=64)
    entries = {key: Entry(key, shape, torch.bfloat16) for key, shape in shapes.items()}
    checkpoint = Checkpoint(tmp_path / "released.ckpt", [], entries, {})
    form, prefix = detect(checkpoint)
    assert (form.name, prefix) == ("ultragen", "")
    found = infer(checkpoint, form, prefix)
    assert found.recipe["backbone"] == {"name": "wan", "preset": "t2v_1_3b"}
    for source in ("ultragen_1080p_released", "ultragen_4k_released", found.recipe):
        plan = ultrazoo.plan(source)
        slots = {slot.name: slot.entry() for slot in slots_of(skeleton(plan)) if slot.saved}
        fits = match(checkpoint, slots, backbone="wan", model=plan.name, whole=True)
        assert len(fits.reused) == len(shapes) == 30 * 27 + 15 + 24 * 44
        assert plan.totals.parameters == sum(entry.numel for entry in entries.values())
    # the paper's own layout is another model
    slots = {slot.name: slot.entry() for slot in slots_of(skeleton(ultrazoo.plan("ultragen_1080p"))) if slot.saved}
    with pytest.raises(WeightsError, match="does not fit"):
        match(checkpoint, slots, backbone="wan", model="paper", whole=True)
