"""Tiny diffusers models of every adapted class, and arguments for them: what the adapter tests run on.

A row's `settings` are constructor arguments; `variants` change the adapter's own arguments, one way each: masks, further
streams, timesteps per token. Every variant is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

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
    softmax: bool = True


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

CASES = [(name, variant) for name, row in TINY.items() for variant in row.variants]


def made(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with every parameter random, so that no gate or output is zero and attention is peaked."""
    torch.manual_seed(seed)
    model: nn.Module = getattr(diffusers, name)(**TINY[name].settings)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.normal_(0, 0.2).add_(1.0 if "norm" in path and path.endswith("weight") else 0.0)
    return model.eval()


def arguments(name: str, variant: str, grid: tuple[int, int, int], seed: int = 1) -> dict[str, Any]:
    """Arguments of a forward over `grid`, batch 2."""
    torch.manual_seed(seed)
    model_settings = {**_defaults(name), **TINY[name].settings}
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
