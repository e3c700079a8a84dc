"""Fusing branch outputs: weights, gates from the diffusion time, gates from each token.

Source: UltraGen arXiv:2510.18775 section 4.3 and `sin256` as its code computes it; VSA and NSA for token gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import affine


def sinusoid(timestep: Tensor, size: int = 256) -> Tensor:
    """[cos | sin] of timestep * 10000^(-i/(size/2)): (...) → (..., size)."""
    half = size // 2
    waves = [timestep.double() * math.exp(-math.log(10000.0) * i / half) for i in range(half)]
    return torch.stack([torch.cos(a) for a in waves] + [torch.sin(a) for a in waves], dim=-1)


def per_token(timestep: Tensor, grid: Sequence[int]) -> Tensor:
    """A timestep per sample, frame or token → (B, 1) or (B, N)."""
    t, h, w = grid
    if timestep.ndim == 1:
        return timestep[:, None]
    if timestep.shape[1] == t * h * w:
        return timestep
    rows = [timestep[:, i : i + 1].expand(-1, h * w) for i in range(t)]
    return torch.cat(rows, dim=1)


def mlp(weights: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Linear, SiLU, Linear, SiLU, Linear, called prefix + 0, 2, 4."""
    for i in (0, 2):
        x = affine(weights, f"{prefix}{i}", x)
        x = x * torch.sigmoid(x)
    return affine(weights, f"{prefix}4", x)


def spread(gate: Tensor, per: str, head_dim: int, inner: int) -> Tensor:
    """A gate per channel, head or scalar → one per channel: (..., inner)."""
    if per == "head":
        return torch.cat([gate[..., i : i + 1].expand(*gate.shape[:-1], head_dim) for i in range(gate.shape[-1])], -1)
    if per == "scalar":
        return gate.expand(*gate.shape[:-1], inner)
    assert per == "channel"
    return gate


def leaves(order: Any) -> list[str]:
    """Branch names of a nested order, left to right."""
    return [order] if isinstance(order, str) else [name for part in order for name in leaves(part)]


def time_gate(
    outputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    timestep: Tensor,
    grid: Sequence[int],
    head_dim: int,
) -> Tensor:
    """Nested pairs: [p, q] = g*p + (1-g)*q, gates counted in pre-order, the outermost pair first."""
    embedded = sinusoid(per_token(timestep, grid))
    counter = iter(range(len(outputs)))

    def mix(order: Any) -> Tensor:
        if isinstance(order, str):
            return outputs[order]
        gate = torch.sigmoid(mlp(weights, f"gates.{next(counter)}.", embedded))
        left, right = mix(order[0]), mix(order[1])
        gate = spread(gate, options["per"], head_dim, left.shape[-1])
        return gate * left + (1 - gate) * right

    return mix(options["order"])


def weighted(outputs: Mapping[str, Tensor], options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """Fixed or learned weights in the order of the branches; none given is the mean."""
    total = torch.zeros_like(next(iter(outputs.values())))
    given = options["weights"]
    for i, (name, y) in enumerate(outputs.items()):
        if options["learned"]:
            w: Any = weights["weight"][i]
        else:
            w = 1 / len(outputs) if given is None else given[name]
        total = total + w * y
    return total


def token_gate(
    outputs: Mapping[str, Tensor], options: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor, head_dim: int
) -> Tensor:
    """Gates from each token, one linear map whose rows stand branch after branch."""
    raw = affine(weights, "gate", x)
    width = raw.shape[-1] // len(outputs)
    logits = torch.stack([raw[..., i * width : (i + 1) * width] for i in range(len(outputs))])
    if options["act"] == "softmax":
        powers = torch.exp(logits - logits.amax(0, keepdim=True).detach())
        gates = powers / powers.sum(0, keepdim=True)
    elif options["act"] == "sigmoid":
        gates = 1 / (1 + torch.exp(-logits))
    else:
        assert options["act"] == "none"
        gates = logits
    total = torch.zeros_like(next(iter(outputs.values())))
    for gate, y in zip(gates, outputs.values(), strict=True):
        total = total + spread(gate, options["per"], head_dim, y.shape[-1]) * y
    return total
