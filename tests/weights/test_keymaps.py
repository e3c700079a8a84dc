"""Key tables: both ways, complete, and true to what other programs write."""

from __future__ import annotations

import pytest
import torch

from ultrazoo.weights.keymaps import FORMATS, strip_prefix

from . import layouts

EXAMPLES = {"wan": layouts.wan(11), "ultragen": layouts.ultragen((1, 10), of=11)}


def diffusers_shapes(layers=2):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=layouts.HEADS,
            attention_head_dim=layouts.DIM // layouts.HEADS,
            num_layers=layers,
            ffn_dim=layouts.FFN,
            text_dim=layouts.TEXT,
            freq_dim=layouts.TIME,
            in_channels=layouts.CHANNELS,
            out_channels=layouts.CHANNELS,
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_there_and_back(name):
    form = FORMATS[name]
    ours = {key: form.ours(key) for key in EXAMPLES[name]}
    assert None not in ours.values()
    assert len(set(ours.values())) == len(ours)
    assert {form.theirs(value): key for key, value in ours.items()} == {key: key for key in ours}


def test_diffusers_names_are_wans_by_another_name():
    form = FORMATS["diffusers"]
    theirs = diffusers_shapes()
    assert {form.ours(key): shape for key, shape in theirs.items()} == layouts.wan()
    assert {form.theirs(name) for name in layouts.wan()} == set(theirs)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        # the released global branch is number 1, the regional one number 2 and "hierachcal"
        ("blocks.7.self_attn.k_lora_1.lora_A.bias", "blocks.7.attention.branches.global_.adapt.k.lora_A.bias"),
        ("blocks.7.self_attn.v_lora_2.lora_B.weight", "blocks.7.attention.branches.regional.adapt.v.lora_B.weight"),
        ("blocks.7.self_attn.downsample_conv.weight", "blocks.7.attention.branches.global_.compress.conv.weight"),
        ("blocks.7.self_attn.upsample_conv_hierachcal.bias", "blocks.7.attention.branches.regional.lift.conv.bias"),
        # a = alpha_time_* mixes all of them, b = alpha_time_*2 local and regional
        ("blocks.7.self_attn.alpha_time_embedding.2.weight", "blocks.7.attention.fuse.gates.0.2.weight"),
        ("blocks.7.self_attn.alpha_time_projection2.1.bias", "blocks.7.attention.fuse.gates.1.4.bias"),
    ],
)
def test_released_names(key, name):
    assert FORMATS["ultragen"].ours(key) == name


@pytest.mark.parametrize("name", ["wan", "diffusers", "ultragen"])
@pytest.mark.parametrize(
    "key",
    [
        "blocks.1.cross_attn.k_img.weight",
        "img_emb.proj.0.weight",
        "vace_blocks.0.modulation",
        "blocks.x.modulation",
        "blocks.1.self_attn.q.weight_scale",
        "patch_embedding.weight.more",
    ],
)
def test_unknown_keys_have_no_name(name, key):
    assert FORMATS[name].ours(key) is None


def test_each_format_recognises_its_own_first():
    samples = {
        **EXAMPLES,
        "diffusers": diffusers_shapes(1),
        "ultrazoo": ["blocks.0.attention.fuse.weight", *layouts.wan()],
    }
    for name, keys in samples.items():
        assert next(form.name for form in FORMATS.values() if form.recognises(keys)) == name


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "module.", "pipe.dit."])
def test_prefixes(prefix):
    assert strip_prefix([prefix + key for key in layouts.wan()]) == prefix


def test_a_prefix_is_in_front_of_every_key():
    assert strip_prefix(["model.a", "b"]) == ""
    assert strip_prefix([]) == ""
