"""Tiny image models that attend text and image jointly in one sequence (FLUX.2, Z-Image), and the ways to call them."""

from __future__ import annotations

from typing import Any

import torch

from ultrazoo.backbones.diffusers.flux2 import image_ids
from ultrazoo.grid import Grid


def as_it_is(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return arguments


def references(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Two reference images, and ids per sample."""
    image = arguments["hidden_states"]
    ids = [arguments["img_ids"], image_ids(Grid(1, 2, 3), 10), image_ids(Grid(1, 3, 2), 20)]
    return {
        **arguments,
        "hidden_states": torch.cat([image, torch.randn(2, 12, image.shape[-1])], dim=1),
        "img_ids": torch.cat(ids).expand(2, -1, -1),
        "txt_ids": arguments["txt_ids"].expand(2, -1, -1),
    }


def cropped(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """A target whose positions do not begin at 0."""
    return {**arguments, "img_ids": arguments["img_ids"] + torch.tensor([0, 3, 5, 0])}


def texts(*lengths: int) -> Any:
    def change(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
        return {**arguments, "cap_feats": [torch.randn(length, 12) for length in lengths]}

    return change


ROWS: dict[str, dict[str, Any]] = {
    "Flux2Transformer2DModel": {
        "settings": {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        "grids": ((1, 4, 6), (1, 5, 7)),
        "variants": {"plain": as_it_is, "references": references, "cropped": cropped},
    },
    "ZImageTransformer2DModel": {
        "settings": {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 32, 32],
        },
        # the first size needs no pads
        "grids": ((1, 4, 8), (1, 5, 7)),
        "variants": {
            "plain": as_it_is,
            "a whole text": texts(32, 32),
            "one long text": texts(7, 40),
            "the other long": texts(90, 7),
        },
    },
}
