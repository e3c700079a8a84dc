"""What the latents of an exported model are: the VAE's strides, patch and, where they are known, mean and deviation.

Whoever runs the file alone needs them on both sides of it: a VAE's latents are shifted and scaled before the model sees
them, and back before they are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..spec import BackboneSpec


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split()]


WAN_2_1 = {
    "vae": "Wan2.1",
    "mean": _numbers(
        "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503 -.2921"
    ),
    "std": _numbers(
        "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.916"
    ),
    "source": "defaults of AutoencoderKLWan, diffusers",
}
STABLE_DIFFUSION = {
    "vae": "Stable Diffusion",
    "mean": [0.0] * 4,
    "std": [1 / 0.18215] * 4,
    "source": "arXiv:2112.10752, factor 0.18215",
}
KNOWN: Mapping[tuple[str, tuple[int, ...], int], Mapping[str, Any]] = {
    ("wan", (4, 8, 8), 16): WAN_2_1,
    ("dit", (1, 8, 8), 4): STABLE_DIFFUSION,
}
"""By backbone, strides and channels of the latents."""


def latents_of(backbone: BackboneSpec) -> dict[str, Any]:
    """Strides of the VAE and patch of the model (T, H, W), channels in and out, and ``statistics`` per channel: the model
    takes ``(latents - mean) / std``. None for what is not known."""
    geometry = getattr(backbone, "geometry", None)
    strides = None if geometry is None else tuple(geometry.strides)
    channels = backbone.ports(image=True)[0].shape[1]
    assert isinstance(channels, int)
    return {
        "strides": None if strides is None else list(strides),
        "patch": None if geometry is None else list(geometry.patch),
        "channels": channels,
        "output_channels": channels * getattr(backbone, "outputs", 1),
        "statistics": None if strides is None else KNOWN.get((backbone.name, strides, channels)),
    }
