"""Adapters over diffusers' transformers, one file per class, found by the class's name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapter import Adapter

ADAPTERS = {
    "CogVideoXTransformer3DModel": "cogvideox:CogVideoXAdapter",
    "Flux2Transformer2DModel": "flux2:Flux2Adapter",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15:HunyuanVideo15Adapter",
    "HunyuanVideoTransformer3DModel": "hunyuan_video:HunyuanVideoAdapter",
    "Kandinsky6Transformer3DModel": "kandinsky6:Kandinsky6Adapter",
    "LTX2VideoTransformer3DModel": "ltx2:LTX2VideoAdapter",
    "LTXVideoTransformer3DModel": "ltx:LTXVideoAdapter",
    "MiniMaxH3Transformer3DModel": "minimax_h3:MiniMaxH3Adapter",
    "PixArtTransformer2DModel": "pixart:PixArtAdapter",
    "QwenImageTransformer2DModel": "qwen_image:QwenImageAdapter",
    "SD3Transformer2DModel": "sd3:SD3Adapter",
    "SanaVideoTransformer3DModel": "sana_video:SanaVideoAdapter",
    "WanTransformer3DModel": "wan:WanAdapter",
    "ZImageTransformer2DModel": "z_image:ZImageAdapter",
}
"""Class name → ``module:attribute`` in this package."""


def adapter_named(model: str) -> Adapter:
    """The adapter of a diffusers class. Raises KeyError for a class without one."""
    module, _, attribute = ADAPTERS[model].partition(":")
    found: Any = getattr(importlib.import_module(f".{module}", __name__), attribute)
    return found()  # type: ignore[no-any-return]


def class_name_of(model: Any) -> str | None:
    """The name of the adapted diffusers class that `model` is of; None where there is no adapter for it."""
    for cls in type(model).__mro__:
        if cls.__name__ in ADAPTERS and cls.__module__.startswith("diffusers."):
            return cls.__name__
    return None
