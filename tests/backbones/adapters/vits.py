"""Tiny vision transformers of timm: one of each family that an adapter restores, and of each option beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
GRIDS = ((1, 4, 4), (1, 5, 7))
"""The size that the tiny models are made for, and one beyond it."""


@dataclass(frozen=True)
class Vit:
    """`model`: timm's name. `settings`: other arguments of create_model than the small ones, at a grid of 4 x 4."""

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dynamic: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        patch = int(self.model.partition("patch")[2].partition("_")[0])
        return {**SMALL, "img_size": 4 * patch, "dynamic_img_size": self.dynamic, **self.settings}


FAMILIES = {
    "DeiT-3": Vit("deit3_small_patch16_224", {"init_values": 0.5}),
    "SigLIP": Vit("vit_base_patch16_siglip_224", {"num_classes": 0}),
    "DINOv2, registers": Vit("vit_small_patch14_reg4_dinov2"),
    "DINOv3": Vit("vit_small_patch16_dinov3"),
    "EVA-02": Vit("eva02_tiny_patch14_224"),
}
"""Five families whose restoration is a figure of the documentation."""

OTHERS = {
    "DINOv2": Vit("vit_small_patch14_dinov2"),
    "EVA-02, projections apart": Vit("eva02_base_patch14_224"),
    "EVA, no rotation": Vit("eva_giant_patch14_224"),
    "rotation, axes xy": Vit("vit_small_patch16_rope_224"),
    "rotation, learned": Vit("vit_small_patch16_rope_mixed_224"),
    "registers alone": Vit("vit_base_patch16_rope_reg1_gap_256"),
    "norms of queries and keys": Vit("vit_tiny_patch16_224", {"qk_norm": True}),
    "two class tokens": Vit("deit_tiny_distilled_patch16_224"),
    "one size": Vit("deit3_small_patch16_224", dynamic=False),
    "one size, rotation": Vit("eva02_tiny_patch14_224", dynamic=False),
}
VITS = FAMILIES | OTHERS


def made(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model with every parameter random, so that no scale is small and attention is peaked."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(VITS[name].model, **{**VITS[name].arguments, **changes})
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and "freqs" not in path:
                parameter.normal_(0, 1.2 / parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.2).add_(1.0 if path.endswith(("weight", "gamma")) else 0.0)
    return model.eval()


def image(model: Any, grid: tuple[int, int, int], seed: int = 1) -> Tensor:
    """A batch of two; a model for one size is set to it."""
    torch.manual_seed(seed)
    high, wide = (n * patch for n, patch in zip(grid[1:], model.patch_embed.patch_size, strict=True))
    if not model.dynamic_img_size:
        model.set_input_size(img_size=(high, wide))
    return torch.randn(2, 3, high, wide)


def recipe(attention: Any, grid: tuple[int, int, int] = GRIDS[0], **more: Any) -> dict[str, Any]:
    return {"name": "x", "video": {"grid": list(grid)}, "attention": {"*": attention}, **more}
