"""Text encoders and VAEs: the constants against torch's counter on the published architectures, on meta."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.cost.fakes import Sampler, Share, Toy
from ultrazoo.attention.full import FullSpec
from ultrazoo.backbones.dit import DitSpec
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.cost import companions, price
from ultrazoo.grid import Grid

WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
SD = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


def decoding(name: str, config: dict, latent: Grid, channels: int) -> tuple[int, int]:
    """(FLOPs, parameters) of decoding `latent` with a diffusers VAE."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = getattr(diffusers, name)(**config)
        size = (latent.t, channels, latent.h, latent.w) if channels == 4 else (1, channels, *latent)
        z = torch.empty(size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(z)
    return counter.get_total_flops(), sum(one.numel() for one in vae.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("latent", [Grid(1, 8, 6), Grid(3, 4, 6)])
@pytest.mark.parametrize(
    ("made", "name", "config", "channels"),
    [
        (companions.wan21_vae, "AutoencoderKLWan", {}, 16),
        (companions.wan22_vae, "AutoencoderKLWan", WAN22, 48),
        (companions.sd_vae, "AutoencoderKL", SD, 4),
    ],
)
def test_vae_constants(made, name, config, channels, latent):
    one = made(latent)
    assert (one.flops, one.parameters) == decoding(name, config, latent, channels)


@pytest.mark.slow
def test_text_encoder_constants():
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
        tokens = torch.zeros(1, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens)
    one = companions.umt5_xxl(40, 1)
    assert one.flops == counter.get_total_flops()
    assert one.parameters == sum(p.numel() for p in model.parameters())


def names(spec, grid, sampling=None):
    sites = spec.sites(grid)
    plan = price(spec, sites, [FullSpec()] * spec.layers, grid=grid, sampling=sampling)
    return {one.role: one for one in plan.companions}


def test_backbones_name_their_companions():
    grid = Grid(2, 4, 6)
    found = names(WanSpec(layers=1), grid)
    assert found["VAE decoder"].name == "Wan2.1 VAE"
    assert found["VAE decoder"].flops == companions.wan21_vae(Grid(2, 8, 12)).flops
    assert found["text encoder"].flops * 2 == names(WanSpec(layers=1), grid, Sampler(5, 4.0))["text encoder"].flops
    assert names(WanSpec(**WanSpec.presets["ti2v_5b"]), grid)["VAE decoder"].name == "Wan2.2 VAE"
    assert names(WanSpec(layers=1, text_dim=32, channels=3), grid) == {}
    assert list(names(DitSpec(layers=1), Grid(1, 4, 4))) == ["VAE decoder"]


def test_what_is_not_known_is_not_priced():
    backbone = Toy(depth=1)
    grid = Grid(1, 4, 4)
    assert price(backbone, backbone.sites(grid), [Share()], grid=grid).companions == ()
