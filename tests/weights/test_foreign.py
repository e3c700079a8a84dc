"""Weights of other programs, in exactly their files: diffusers, the original Wan, the released UltraGen; and bad ones."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import ultrazoo
from ultrazoo.errors import WeightsError
from ultrazoo.weights.keymaps import FORMATS

from . import layouts
from .models import PAPER, RELEASED, build_directory, error_ratio, inputs, same, tiny


@pytest.fixture(scope="module")
def reference():
    """A tiny WanTransformer3DModel with every parameter random."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=layouts.HEADS,
        attention_head_dim=layouts.DIM // layouts.HEADS,
        num_layers=2,
        ffn_dim=layouts.FFN,
        text_dim=layouts.TEXT,
        freq_dim=layouts.TIME,
        in_channels=layouts.CHANNELS,
        out_channels=layouts.CHANNELS,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return model


@pytest.mark.parametrize("shard", ["10GB", "30KB"])
@pytest.mark.parametrize("place", ["", "transformer"])
def test_a_diffusers_directory_gives_diffusers_outputs(tmp_path, reference, shard, place):
    reference.save_pretrained(tmp_path / "hub" / place, max_shard_size=shard)
    model = ultrazoo.build(tiny(weights={"path": str(tmp_path / "hub"), "format": "diffusers"})).eval()
    latents, timestep, text = inputs()
    with torch.no_grad():
        due = reference(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        got = model(latents, timestep, text)
    assert error_ratio(got, due) < 1e-5
    assert error_ratio(torch.zeros_like(got), due) > 0.5
    assert model.origin["weights"]["format"] == "diffusers"


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pth"])
def test_original_wan_files(tmp_path, suffix):
    tensors = layouts.tensors(layouts.wan())
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    model = ultrazoo.build(tiny(weights={"path": str(path)}))
    assert same(sorted(model.state_dict().items()), sorted(tensors.items()))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_released_ultragen_files(tmp_path, suffix):
    tensors = layouts.tensors(layouts.ultragen((1,), rank=4), torch.bfloat16)
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    source = tiny(RELEASED, weights={"path": str(path), "format": "ultragen"})
    found = build_directory(source, tmp_path / "out")
    assert (found.new, found.dropped) == ((), ())
    model = ultrazoo.from_pretrained(tmp_path / "out")
    form = FORMATS["ultragen"]
    state = model.state_dict()
    assert {form.theirs(name) for name in state} == set(tensors)
    assert all(torch.equal(state[form.ours(key)], tensor.float()) for key, tensor in tensors.items())
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["origin"]["weights"]
    assert (origin["format"], origin["reused"]) == ("ultragen", len(tensors))


def released_block(**changes):
    """The released design written out, without its windows, with some of it changed."""
    conv, lora = {"name": "depthwise_conv"}, {"name": "lora", "rank": 4, "bias": True}
    return {
        "name": "branched",
        "branches": {
            "local": {},
            "regional": {"compress": {**conv, "factor": 2}, "adapt": lora},
            "global": {"compress": {**conv, "factor": 4}, "adapt": {**lora, "key_from": "query"}},
        },
        "fuse": {"name": "time_gate", "order": [["local", "regional"], "global"]},
        **changes,
    }


@pytest.fixture
def released(tmp_path):
    save_file(layouts.tensors(layouts.ultragen((0, 1), rank=4)), tmp_path / "x.safetensors")
    return {"path": str(tmp_path / "x.safetensors")}


def test_released_weights_do_not_go_into_the_paper_design(tmp_path, released):
    with pytest.raises(WeightsError, match="does not fit tiny") as caught:
        build_directory(tiny(PAPER, weights=released), tmp_path / "out")
    assert "_lora_1.lora_A.bias" in str(caught.value)
    assert str(caught.value).endswith("its extra weights belong to the design {name: ultragen, variant: released}")
    assert not (tmp_path / "out").exists()


def test_released_weights_do_not_go_into_a_block_that_misreads_them(tmp_path, released):
    assert not ultrazoo.build(tiny(released_block(), weights=released)).origin["weights"]["new"]
    branches = released_block()["branches"]
    branches["global"]["adapt"].pop("key_from")
    wrong = released_block(branches=branches, fuse={"name": "time_gate", "order": ["global", ["local", "regional"]]})
    with pytest.raises(WeightsError, match=r"would misread; nothing was loaded") as caught:
        build_directory(tiny(wrong, weights=released), tmp_path / "out")
    text = str(caught.value)
    assert (
        'attention.0-1.fuse.order   the weights belong to [["local", "regional"], "global"], got ["global", [' in text
    )
    assert 'attention.0-1.branches.global.adapt.key_from   the weights belong to "query", got "key"' in text
    assert "variant: released" in text
    assert not (tmp_path / "out").exists()


def test_our_own_gates_are_not_misread_either(tmp_path):
    block = released_block()
    ultrazoo.save(ultrazoo.build(tiny(block)), tmp_path / "base")
    weights = {"path": str(tmp_path / "base")}
    turned = released_block(fuse={"name": "time_gate", "order": [["regional", "local"], "global"]})
    with pytest.raises(WeightsError, match=r"attention\.0-1\.fuse\.order"):
        ultrazoo.build(tiny(turned, weights=weights))
    # other windows read the same weights in the same way
    block["branches"]["local"] = {"layout": {"name": "windows", "counts": 2}}
    assert not ultrazoo.build(tiny(block, weights=weights)).origin["weights"]["new"]


def test_weights_find_a_layer_that_has_alternatives_for_some_steps(tmp_path, released):
    source = tiny(released_block(), weights=released, sampling={"steps": 4}, steps={"0-1": {"*": {"name": "full"}}})
    model = ultrazoo.build(source)
    assert (model.origin["weights"]["new"], model.origin["weights"]["dropped"]) == ([], [])
    ultrazoo.save(model, tmp_path / "out")
    back = ultrazoo.build(tiny(released_block(), weights={"path": str(tmp_path / "out")}))
    assert (back.origin["weights"]["new"], back.origin["weights"]["dropped"]) == ([], [])


def test_pretrained_weights_into_a_new_design(tmp_path):
    tensors = layouts.tensors(layouts.wan())
    save_file(tensors, tmp_path / "x.safetensors")
    attention = {"name": "branched", "branches": {"all": {"adapt": "own"}}}
    source = tiny(attention, weights={"path": str(tmp_path / "x.safetensors")})
    found = build_directory(source, tmp_path / "out")
    assert "blocks.0-1.attention.branches.all.adapt.q.weight" in found.data()["new"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    # what starts as a copy of the host starts as a copy of what was loaded
    for which in "qkv":
        own = state[f"blocks.1.attention.branches.all.adapt.{which}.weight"]
        assert torch.equal(own, tensors[f"blocks.1.self_attn.{which}.weight"])
    fresh = ultrazoo.build(source).eval()
    full = ultrazoo.build(tiny(weights={"path": str(tmp_path / "x.safetensors")})).eval()
    with torch.no_grad():
        assert error_ratio(fresh(*inputs()), full(*inputs())) < 1e-5


def test_our_own_directory_as_weights(tmp_path):
    model = ultrazoo.build(tiny(PAPER, seed=5))
    ultrazoo.save(model, tmp_path / "base")
    weights = {"path": str(tmp_path / "base"), "format": "ultrazoo"}
    whole = ultrazoo.build(tiny(PAPER, weights=weights))
    assert same(whole.state_dict(), model.state_dict())
    plain = ultrazoo.build(tiny(weights=weights))
    assert plain.origin["weights"]["dropped"]
    assert same(plain.state_dict(), {name: model.state_dict()[name] for name in plain.state_dict()})


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("case", ["absent", "truncated", "size", "model", "code", "text", "format"])
def test_bad_weights_write_nothing(tmp_path, case):
    path = tmp_path / "x.ckpt"
    layout = "auto"
    if case == "truncated":
        path = tmp_path / "x.safetensors"
        save_file(layouts.tensors(layouts.wan()), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "size":
        torch.save(layouts.tensors(layouts.wan(dim=32)), path)
    elif case == "model":
        torch.save({"conv1.weight": torch.ones(3)}, path)
    elif case == "code":
        torch.save({**layouts.tensors(layouts.wan()), "x": Evil(tmp_path / "trace")}, path)
    elif case == "text":
        path.write_text("hello")
    elif case == "format":
        torch.save(layouts.tensors(layouts.wan()), path)
        layout = "diffusers"
    words = {
        "absent": "no such file or directory",
        "truncated": "damaged, cut short",
        "size": "does not fit tiny",
        "model": "is of no known format",
        "code": "holds more than tensors",
        "text": "is damaged|not a safe pickle",
        "format": "has the keys of format 'wan', not of 'diffusers'",
    }
    source = tiny(weights={"path": str(path), "format": layout})
    with pytest.raises(WeightsError, match=words[case]):
        build_directory(source, tmp_path / "deep" / "out")
    with pytest.raises(WeightsError, match=words[case]):
        ultrazoo.build(source)
    assert {one.name for one in tmp_path.iterdir()} <= {path.name}
