"""Wan inside diffusers' WanPipeline, in place of diffusers' own transformer: same frames, steps announced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.backbones.models import diffusers_wan, tiny_wan, wan_inputs
from ultrazoo.attention.full import FullSpec
from ultrazoo.backbones.facade import Sample
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def pipeline(transformer, vae, **changes):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer,
        **changes,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe, **changes):
    generator = torch.Generator().manual_seed(0)
    text = 3 * torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(1))
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=-text,
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generator,
        output_type="np",
        **changes,
    ).frames


@pytest.mark.parametrize("per_token", [False, True])
def test_the_same_frames_as_with_diffusers(vae, per_token):
    model = tiny_wan()
    ours = frames(pipeline(model, vae, expand_timesteps=per_token))
    theirs = frames(pipeline(diffusers_wan(model), vae, expand_timesteps=per_token))
    assert ours.shape == (1, 5, 32, 48, 3)
    assert error_ratio(torch.from_numpy(ours), torch.from_numpy(theirs)) < 1e-4
    other = frames(pipeline(tiny_wan(seed=1), vae, expand_timesteps=per_token))
    assert not np.allclose(ours, other, atol=1e-3)


def test_the_pipeline_says_which_step_it_is_at(vae):
    model = tiny_wan(steps=[(0, 1, {0: FullSpec()})])
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append((model.session.step, model.session.branch)))
    frames(pipeline(model, vae))
    assert seen == [((step, 3), branch) for step in range(3) for branch in ("cond", "uncond")]
    assert model.session.step is None


def test_a_pipeline_without_step_numbers_leaves_the_selection_alone():
    model = tiny_wan()
    model.select(2, 5, "mine")
    with model.cache_context("cond"):
        assert (model.session.step, model.session.branch) == ((2, 5), "mine")
    with model.cache_context("cond", step_index=4, num_inference_steps=5, sigma=0.1):
        assert (model.session.step, model.session.branch) == ((4, 5), "cond")
    assert (model.session.step, model.session.branch) == ((2, 5), "mine")


def test_keyword_call_returns_a_tuple_with_the_sample():
    model = tiny_wan()
    latents, time, text = wan_inputs((3, 8, 12))
    with torch.no_grad():
        plain = model(latents, time, text)
        for return_dict in (False, True):
            out = model(hidden_states=latents, timestep=time, encoder_hidden_states=text, return_dict=return_dict)
            assert isinstance(out, Sample)
            assert isinstance(out, tuple)
            assert len(out) == 1
            assert torch.equal(out[0], plain)
            assert out.sample is out[0]


def test_what_would_be_ignored_is_refused():
    model = tiny_wan()
    latents, time, text = wan_inputs((3, 8, 12))
    with pytest.raises(UsageError, match="no attention processors"):
        model(latents, time, text, attention_kwargs={"scale": 0.5})
    with pytest.raises(UsageError, match="return_dict"):
        model(latents, time, text, return_dict=False)
    with pytest.raises(UsageError, match="needs latents, timestep and text"):
        model(latents, time)
    with pytest.raises(TypeError):
        model(hidden_states=latents, timestep=time, encoder_hidden_states=text, encoder_hidden_states_image=text)


def test_config_by_key_and_attribute():
    config = tiny_wan().config
    assert config.patch_size == config["patch_size"] == (1, 2, 2)
    assert config.in_channels == 4
    assert not hasattr(config, "sample_size")
    assert config.get("sample_size") is None


def test_dtype_and_device():
    model = tiny_wan().bfloat16()
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
