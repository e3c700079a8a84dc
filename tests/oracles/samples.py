"""Random weights for oracles that are checked without any fast code: names and shapes as a built attention has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cells
from .names import stored


def randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def linear(generator: torch.Generator, name: str, out: int, of: int) -> dict[str, Tensor]:
    return {f"{name}.weight": randn(generator, out, of, scale=of**-0.5), f"{name}.bias": randn(generator, out)}


def host_weights(generator: torch.Generator, dim: int, width: int) -> dict[str, Tensor]:
    """A host with q/k norms over all heads."""
    weights: dict[str, Tensor] = {}
    for which in "qkv":
        weights |= linear(generator, which, width, dim)
    weights |= linear(generator, "o", dim, width)
    return weights | {f"norm_{w}.weight": 1 + randn(generator, width, scale=0.3) for w in "qk"}


def branch_weights(generator: torch.Generator, branch: Mapping[str, Any], dim: int, width: int) -> dict[str, Tensor]:
    """Own parameters of one branch."""
    weights: dict[str, Tensor] = {}
    compress, adapt = branch["compress"], branch["adapt"]
    if compress is not None and compress["name"] == "depthwise_conv":
        kernel = cells.factors(compress["factor"])
        kernel = kernel[1:] if kernel[0] == 1 else kernel
        weights["compress.conv.weight"] = randn(generator, dim, 1, *kernel)
        weights["compress.conv.bias"] = randn(generator, dim)
    if compress is not None and compress["of"] == "both" and compress["lift"] == "bilinear_conv3d":
        weights["lift.conv.weight"] = randn(generator, width, 1, 3, 3, 3, scale=0.2)
        weights["lift.conv.bias"] = randn(generator, width)
    for which in "qkv":
        if adapt["name"] == "lora":
            weights |= linear(generator, f"adapt.{which}.lora_A", adapt["rank"], dim)
            weights |= linear(generator, f"adapt.{which}.lora_B", width, adapt["rank"])
        elif adapt["name"] == "own":
            weights |= linear(generator, f"adapt.{which}", width, dim)
    return weights


def time_gate_weights(generator: torch.Generator, pairs: int, dim: int, out: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for j in range(pairs):
        for i, (rows, columns) in zip((0, 2, 4), ((dim, 256), (dim, dim), (out, dim)), strict=True):
            weights |= linear(generator, f"gates.{j}.{i}", rows, columns)
    return weights


def branch(
    compress: Mapping[str, Any] | None = None,
    layout: Mapping[str, Any] | None = None,
    shift: Mapping[str, Any] | None = None,
    adapt: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A branch with every option written out."""
    plain_compress = {"of": "both", "lift": "bilinear_conv3d", "ragged": "exact"}
    return {
        "compress": None if compress is None else plain_compress | dict(compress),
        "layout": {"counts": None, "size": None, "ragged": "exact"} | dict(layout or {"name": "whole"}),
        "shift": dict(shift or {"name": "none"}),
        "adapt": {"key_from": "key"} | dict(adapt or {"name": "shared"}),
        "coords": {"origin": "grid", "cell": "centre", "rule": "none"} | dict(coords or {}),
    }


def own_weights(
    generator: torch.Generator, options: Mapping[str, Any], dim: int, width: int, gates: int = 0
) -> dict[str, Tensor]:
    """Own parameters of a whole branched attention whose fuse is time gates (`gates` of them) or fixed weights."""
    weights: dict[str, Tensor] = {}
    for name, one in options["branches"].items():
        found = branch_weights(generator, one, dim, width)
        weights |= {f"branches.{stored(name)}.{k}": v for k, v in found.items()}
    found = time_gate_weights(generator, gates, dim, width)
    return weights | {f"fuse.{k}": v for k, v in found.items()}


def ultragen_options(variant: str, rank: int = 3) -> dict[str, Any]:
    """What the UltraGen block is in terms of branches."""
    ragged = "exact" if variant == "paper" else "resize"
    window = {"origin": "window", "cell": "index"}
    global_key = "key" if variant == "paper" else "query"
    conv = {"name": "depthwise_conv", "ragged": ragged}
    lora = {"name": "lora", "rank": rank}
    windows_of = {"name": "windows", "ragged": ragged}
    again = {"name": "repartition"}
    near = ["local", "regional"]
    return {
        "branches": {
            "local": branch(layout=windows_of | {"counts": [4, 4]}, shift=again, coords=window),
            "regional": branch(conv | {"factor": 2}, windows_of | {"counts": [2, 2]}, again, lora, window),
            "global": branch(conv | {"factor": 4}, adapt=lora | {"key_from": global_key}, coords={"cell": "index"}),
        },
        "fuse": {
            "name": "time_gate",
            "per": "channel",
            "order": ["global", near] if variant == "paper" else [near, "global"],
        },
    }


def sizes_of(grid: Sequence[int]) -> int:
    t, h, w = grid
    return t * h * w
