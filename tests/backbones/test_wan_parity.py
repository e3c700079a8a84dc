"""Wan with full attention against diffusers' WanTransformer3DModel with the same weights, values and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.backbones.models import diffusers_name, diffusers_wan, tiny_wan, wan_inputs
from ultrazoo.testing import assert_close, error_ratio, null_answers

RATIO = 1e-5
SIZES = [(1, 4, 6), (3, 8, 12), (5, 14, 18), (2, 6, 2)]


def both(size, timestep="sample", **changes):
    model = tiny_wan(**changes)
    other = diffusers_wan(model)
    latents, time, text = wan_inputs(size, timestep=timestep, spec=model.spec)
    return model, other, latents, time, text


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("timestep", ["sample", "token"])
def test_values(size, timestep):
    model, other, latents, time, text = both(size, timestep)
    with torch.no_grad():
        ours = model(latents, time, text)
        theirs = other(latents, time, text, return_dict=False)[0]
    assert_close(f"wan {size}, timestep per {timestep}", ours, theirs, RATIO)
    assert ours.shape == latents.shape
    for name, wrong in null_answers(theirs, latents).items():
        assert error_ratio(wrong, theirs) > 100 * RATIO, name


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_head_sizes_of_every_rope_split(heads):
    # 48, 16 and 6 channels a head: (16, 16, 16), (8, 4, 4) and (2, 2, 2) over t, h, w
    model, other, latents, time, text = both((3, 8, 12), heads=heads)
    with torch.no_grad():
        assert_close(f"{heads} heads", model(latents, time, text), other(latents, time, text).sample, RATIO)


def test_timestep_per_frame_equals_the_same_per_token():
    model, other, latents, frames, text = both((3, 8, 12), "frame")
    tokens = frames.repeat_interleave(4 * 6, dim=1)
    with torch.no_grad():
        per_frame = model(latents, frames, text)
        assert_close("per frame", per_frame, other(latents, tokens, text).sample, RATIO)
        assert_close("per token", model(latents, tokens, text), per_frame, RATIO)


def test_one_timestep_in_four_shapes():
    model, _, latents, time, text = both((3, 8, 12))
    with torch.no_grad():
        plain = model(latents, time, text)
        for count in (1, 3, 3 * 4 * 6):
            assert_close(f"(B, {count})", model(latents, time[:, None].expand(-1, count), text), plain, RATIO)


def test_integer_timesteps():
    model, other, latents, _, text = both((3, 8, 12))
    time = torch.tensor([999, 7])
    with torch.no_grad():
        assert_close("integers", model(latents, time, text), other(latents, time, text).sample, RATIO)


@pytest.mark.parametrize("timestep", ["sample", "token"])
def test_gradients_of_inputs_and_of_every_parameter(timestep):
    model, other, latents, time, text = both((3, 6, 10), timestep)
    probe = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    inputs = []
    for one in (model, other):
        here = latents.clone().requires_grad_(), text.clone().requires_grad_()
        out = one(hidden_states=here[0], timestep=time, encoder_hidden_states=here[1], return_dict=False)[0]
        (out * probe).sum().backward()
        inputs.append(here)
    for name, ours, theirs in zip(("latents", "text"), *inputs, strict=True):
        assert_close(f"gradient of {name}", ours.grad, theirs.grad, RATIO)
    theirs = dict(other.named_parameters())
    seen = set()
    for name, parameter in model.named_parameters():
        twin = diffusers_name(name)
        seen.add(twin)
        if name.endswith(".k.bias") and "self_attn" not in name:
            continue
        assert_close(f"gradient of {name}", parameter.grad, theirs[twin].grad, 5 * RATIO)
        assert error_ratio(torch.zeros_like(parameter.grad), theirs[twin].grad) == 1
    assert seen == set(theirs)


def test_state_dict_has_the_names_of_the_original_checkpoint():
    block = [
        f"{attn}.{which}.{part}"
        for attn in ("self_attn", "cross_attn")
        for which in "qkvo"
        for part in ("weight", "bias")
    ]
    block += [f"{attn}.{norm}.weight" for attn in ("self_attn", "cross_attn") for norm in ("norm_q", "norm_k")]
    block += [f"{layer}.{part}" for layer in ("norm3", "ffn.0", "ffn.2") for part in ("weight", "bias")]
    names = {f"blocks.{i}.{name}" for i in range(3) for name in [*block, "modulation"]}
    outside = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    outside += ("time_projection.1", "head.head")
    names |= {f"{name}.{part}" for name in outside for part in ("weight", "bias")} | {"head.modulation"}
    assert set(tiny_wan().state_dict()) == names


def test_bfloat16_stays_near_fp32():
    model, _, latents, time, text = both((3, 8, 12))
    with torch.no_grad():
        exact = model(latents, time, text)
        half = model.bfloat16()(latents.bfloat16(), time, text.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close("bfloat16", half, exact, 4e-2)
