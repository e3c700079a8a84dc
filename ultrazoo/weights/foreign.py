"""What stands in a directory that another program reads: file names and ``config.json`` beside the weights.

Diffusers names its weights ``diffusion_pytorch_model``; the original Wan is released under the same name with a config of
its own. Both programs ignore keys of the config that start with an underscore, under which we say who wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..backbones.wan import WanSpec
from .staging import CONVERTED

STEMS: Mapping[str, str] = {
    "diffusers": "diffusion_pytorch_model",
    "wan": "diffusion_pytorch_model",
    "ultragen": "model",
}

DIFFUSERS = "0.42.1"
"""The release whose ``WanTransformer3DModel`` has these settings."""


def config_text(layout: str, spec: WanSpec, came_from: Mapping[str, Any]) -> bytes:
    """``config.json`` of a Wan in the `layout` ``diffusers``, ``wan`` or ``ultragen`` (which is Wan's)."""
    settings = _diffusers(spec) if layout == "diffusers" else _wan(spec)
    content = {**settings, CONVERTED: {"version": __version__, "format": layout, **came_from}}
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _diffusers(spec: WanSpec) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS,
        "added_kv_proj_dim": None,
        "attention_head_dim": spec.head_dim,
        "cross_attn_norm": True,
        "eps": spec.eps,
        "ffn_dim": spec.ffn_dim,
        "freq_dim": spec.time_dim,
        "image_dim": None,
        "in_channels": spec.channels,
        "num_attention_heads": spec.heads,
        "num_layers": spec.layers,
        "out_channels": spec.channels,
        "patch_size": list(spec.patch),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": spec.text_dim,
    }


def _wan(spec: WanSpec) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": spec.dim,
        "eps": spec.eps,
        "ffn_dim": spec.ffn_dim,
        "freq_dim": spec.time_dim,
        "in_dim": spec.channels,
        # the 5B model of Wan 2.2 takes text or an image, and is known by its 48 latent channels
        "model_type": "ti2v" if spec.channels == 48 else "t2v",
        "num_heads": spec.heads,
        "num_layers": spec.layers,
        "out_dim": spec.channels,
        "text_len": spec.text_tokens,
    }
