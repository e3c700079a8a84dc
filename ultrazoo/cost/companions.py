"""What runs beside a diffusion transformer to make a clip: text encoder and VAE decoder, where they are known.

Counted as everything else here: matmul, convolution and attention, 2 FLOPs per multiply-add, for one clip. Not part of
totals, clip or fits: pipelines run them before and after the transformer and may unload them. The constants were counted
with torch's FLOP counter on the architectures' published configurations and are recounted by a test.
"""

from __future__ import annotations

from ..grid import Grid
from ..spec import Companion

UMT5_XXL_PARAMETERS = 5_680_910_336
_UMT5_LAYERS, _UMT5_DIM, _UMT5_HIDDEN = 24, 4096, 10240


def umt5_xxl(tokens: int, prompts: int) -> Companion:
    """UMT5-XXL's encoder over `prompts` prompts of `tokens` tokens (padding included).

    ``layers * (2 * L * (4 * d^2 + 3 * d * f) + 4 * L^2 * d)`` each, d = 4096, f = 10240, 24 layers.
    """
    d, f = _UMT5_DIM, _UMT5_HIDDEN
    one = _UMT5_LAYERS * (2 * tokens * (4 * d * d + 3 * d * f) + 4 * tokens * tokens * d)
    return Companion("text encoder", "UMT5-XXL encoder", UMT5_XXL_PARAMETERS, prompts * one, "google/umt5-xxl")


def wan21_vae(latent: Grid) -> Companion:
    """Decoding by the VAE of Wan2.1 (strides 4, 8, 8; 16 channels); `latent` is (T, h, w) before patchify."""
    flops = _decoder(latent, first=687_882_752, later=2_161_889_792, channels=384)
    return Companion("VAE decoder", "Wan2.1 VAE", 126_892_531, flops, "arXiv:2503.20314")


def wan22_vae(latent: Grid) -> Companion:
    """Decoding by the VAE of Wan2.2-TI2V-5B (strides 4, 16, 16; 48 channels)."""
    flops = _decoder(latent, first=5_830_775_296, later=18_835_608_064, channels=1024)
    return Companion("VAE decoder", "Wan2.2 VAE", 704_688_668, flops, "Wan2.2 release")


def sd_vae(latent: Grid) -> Companion:
    """Decoding by Stable Diffusion's VAE (stride 8, 4 channels), frame by frame; DiT's autoencoder."""
    flops = _decoder(latent, first=605_507_616, later=605_507_616, channels=512)
    return Companion("VAE decoder", "Stable Diffusion VAE", 83_653_863, flops, "arXiv:2112.10752")


def _decoder(latent: Grid, first: int, later: int, channels: int) -> int:
    """``h*w * (first + (T - 1) * later) + 4 * T * (h*w)^2 * channels``: convolutions, whose temporal upsampling makes later
    latent frames dearer, and one attention over each latent frame."""
    cells = latent.h * latent.w
    return cells * (first + (latent.t - 1) * later) + 4 * latent.t * cells * cells * channels
