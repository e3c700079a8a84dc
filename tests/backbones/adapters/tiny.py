"""Tiny diffusers models of every adapted class, and arguments for them: what the adapter tests run on.

`own`: the recipe node that equals the model's own attention. A row's `settings` are constructor arguments; `variants` change the adapter's own arguments, one way each: masks, further
streams, timesteps per token. Every variant is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.backbones.adapters.joint import ROWS as JOINT
from tests.backbones.adapters.packed import ROWS as PACKED
from ultrazoo.backbones.diffusers import adapter_named
from ultrazoo.grid import Grid

Change = Callable[[dict[str, Any], Grid], dict[str, Any]]


def as_it_is(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return arguments


@dataclass(frozen=True)
class Tiny:
    """One model class at toy dimensions. `grids`: two sizes, the second one ragged; `text`: text tokens."""

    settings: Mapping[str, Any]
    grids: tuple[tuple[int, int, int], tuple[int, int, int]] = ((2, 4, 6), (3, 5, 7))
    text: int = 7
    variants: Mapping[str, Change] = field(default_factory=lambda: {"plain": as_it_is})
    own: Any = "full"


def per_token(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    steps = torch.linspace(0, 900, grid.tokens).expand(2, -1).contiguous()
    return {**arguments, "timestep": steps}


def masked_text(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    mask = torch.ones(arguments["encoder_hidden_states"].shape[:2], dtype=torch.bool)
    mask[1, 3:] = False
    return {**arguments, "encoder_hidden_states_mask": mask}


def further_image(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    more = torch.randn(2, 6, arguments["hidden_states"].shape[-1])
    return {
        **arguments,
        "hidden_states": torch.cat([arguments["hidden_states"], more], dim=1),
        "img_shapes": [[tuple(grid), (1, 2, 3)]] * 2,
    }


def masked_image(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    mask = torch.ones(2, grid.tokens)
    mask[1, grid.tokens // 2 :] = 0
    return {**arguments, "attention_mask": mask}


def resized(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    table = get_3d_rotary_pos_embed(16, ((1, 0), (grid.h + 2, grid.w * 2)), (grid.h, grid.w), grid.t)
    return {**arguments, "image_rotary_emb": table}


def reference_frame(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    frames = torch.cat([arguments["hidden_states"], torch.randn_like(arguments["hidden_states"][:, :1])], dim=1)
    positions = (torch.tensor([*range(grid.t), 0]), torch.arange(grid.h), torch.arange(grid.w))
    return {**arguments, "hidden_states": frames, "visual_rope_pos": positions}


def with_audio(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**arguments, "audio_hidden_states": torch.randn(2, 5, 5)}


TINY: dict[str, Tiny] = {
    "WanTransformer3DModel": Tiny(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
        },
        variants={"plain": as_it_is, "per token": per_token},
    ),
    "QwenImageTransformer2DModel": Tiny(
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        grids=((1, 4, 6), (1, 5, 7)),
        variants={"plain": as_it_is, "masked": masked_text, "further image": further_image},
    ),
}
TINY |= {
    "PixArtTransformer2DModel": Tiny(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_size": 16,
            "caption_channels": 12,
        },
        grids=((1, 4, 6), (1, 5, 7)),
        variants={"plain": as_it_is, "masked": masked_image},
    ),
    "SD3Transformer2DModel": Tiny(
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        grids=((1, 4, 6), (1, 5, 7)),
    ),
    "CogVideoXTransformer3DModel": Tiny(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 7,
            "use_rotary_positional_embeddings": True,
        },
        variants={"plain": as_it_is, "resized positions": resized},
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": 12,
        },
        own={"name": "linear", "eps": 1e-15},
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 5,
            "out_audio_dim": 5,
        },
        variants={"plain": as_it_is, "reference frame": reference_frame, "audio": with_audio},
    ),
}


def padded_context(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    found = dict(arguments)
    for name in ("encoder_attention_mask", "encoder_attention_mask_2"):
        if name in found:
            found[name] = found[name].clone()
            found[name][1, 3:] = False
            found[name][0, 5:] = False
    return found


def with_image(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return padded_context({**arguments, "image_embeds": torch.randn_like(arguments["image_embeds"])}, grid)


_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "text_embed_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}
TINY |= {
    "HunyuanVideoTransformer3DModel": Tiny(
        {**_HUNYUAN, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 10},
        variants={"plain": as_it_is, "padded": padded_context},
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {
            **_HUNYUAN,
            "num_layers": 2,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_2_dim": 10,
            "image_embed_dim": 14,
        },
        variants={"plain": as_it_is, "padded": padded_context, "image": with_image},
    ),
}
TINY |= {name: Tiny(**row) for name, row in PACKED.items()}
TINY |= {name: Tiny(**row) for name, row in JOINT.items()}

CASES = [(name, variant) for name, row in TINY.items() for variant in row.variants]


def made(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model with every parameter random, so that no gate or output is zero and attention is peaked.

    `changes`: other settings than the row's.
    """
    torch.manual_seed(seed)
    model: nn.Module = getattr(diffusers, name)(**{**TINY[name].settings, **changes})
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.normal_(0, 0.2).add_(1.0 if "norm" in path and path.endswith("weight") else 0.0)
    return model.eval()


def arguments(name: str, variant: str, grid: tuple[int, int, int], seed: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of a forward over `grid`, batch 2."""
    torch.manual_seed(seed)
    model_settings = {**_defaults(name), **TINY[name].settings, **changes}
    found = adapter_named(name).inputs(model_settings, Grid(*grid), 2, TINY[name].text, torch.randn)
    return TINY[name].variants[variant](found, Grid(*grid))


def _defaults(name: str) -> dict[str, Any]:
    from ultrazoo.backbones.diffusers.spec import _defaults as declared

    return declared(name)


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for one in output for tensor in tensors_of(one)] if isinstance(output, list | tuple) else []
