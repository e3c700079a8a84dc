"""Compression, lift and resize of a token map, cell by cell.

Maps are (B, T, H, W, C) in fp64. Source: design 7, UltraGen arXiv:2510.18775 sections 4.1-4.2 and the behaviour of its
released code at sizes that do not divide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def factors(value: int | Sequence[int]) -> tuple[int, int, int]:
    """One number or two are spatial, three are (t, h, w)."""
    if isinstance(value, int):
        return (1, value, value)
    return (1, *value) if len(value) == 2 else tuple(value)  # type: ignore[return-value]


def compressed_size(grid: Sequence[int], options: Mapping[str, Any] | None) -> tuple[int, int, int]:
    """Cells per axis: a partial cell counts when the policy is ``exact``, and is dropped when it is ``resize``."""
    if options is None:
        return tuple(grid)  # type: ignore[return-value]
    f = factors(options["factor"])
    if options["ragged"] == "exact":
        return tuple(math.ceil(size / k) for size, k in zip(grid, f, strict=True))  # type: ignore[return-value]
    return tuple(size // k for size, k in zip(grid, f, strict=True))  # type: ignore[return-value]


def cell(index: int, factor: int, size: int) -> list[int]:
    """Tokens of one cell on one axis; those past the edge are the edge token again."""
    return [min(index * factor + j, size - 1) for j in range(factor)]


def compress(x: Tensor, options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """x (B, T, H, W, C) → (B, T', H', W', C). `weights` are ``conv.weight`` (C, 1, [kt,] kh, kw) and ``conv.bias``."""
    f = factors(options["factor"])
    grid = x.shape[1:4]
    out_grid = compressed_size(grid, options)
    rows = []
    for place in itertools.product(*(range(n) for n in out_grid)):
        members = list(itertools.product(*(cell(place[a], f[a], grid[a]) for a in range(3))))
        tokens = torch.stack([x[:, t, h, w] for t, h, w in members], dim=1)
        if options["name"] == "avg_pool":
            rows.append(tokens.mean(1))
        elif options["name"] == "stride":
            rows.append(tokens[:, 0])
        elif options["name"] == "depthwise_conv":
            kernel = weights["conv.weight"].flatten(1).T  # members in t, h, w order
            rows.append((tokens * kernel[None]).sum(1) + weights["conv.bias"])
        else:
            raise ValueError(f"unknown compressor {options['name']!r}")
    return torch.stack(rows, dim=1).reshape(x.shape[0], *out_grid, x.shape[-1])


def linear_weights(source: int, target: int, ratio: float) -> Tensor:
    """Matrix (target, source) of linear interpolation: target y reads position (y + 0.5)*ratio - 0.5, clamped."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for y in range(target):
        position = min(max((y + 0.5) * ratio - 0.5, 0.0), source - 1.0)
        low = math.floor(position)
        high = min(low + 1, source - 1)
        matrix[y, low] += 1 - (position - low)
        matrix[y, high] += position - low
    return matrix


def nearest_weights(source: int, target: int, ratio: float) -> Tensor:
    """Matrix (target, source): target y reads source floor(y * ratio)."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for y in range(target):
        matrix[y, min(math.floor(y * ratio + 1e-9), source - 1)] = 1.0
    return matrix


def along(z: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply one matrix per axis of a map (B, T, H, W, C)."""
    mt, mh, mw = matrices
    return torch.einsum("at,bh,cw,nthwd->nabcd", mt, mh, mw, z)


def resize(z: Tensor, grid: Sequence[int]) -> Tensor:
    """Bilinear resize of every axis whose size changes (align_corners False, no antialiasing)."""
    if tuple(z.shape[1:4]) == tuple(grid):
        return z
    return along(z, [linear_weights(s, t, s / t) for s, t in zip(z.shape[1:4], grid, strict=True)])


def lift(z: Tensor, grid: Sequence[int], options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """z (B, T', H', W', D) → (B, T, H, W, D). `weights` are ``conv.weight`` (D, 1, 3, 3, 3) and ``conv.bias``.

    Exact: to the full multiple of the factor, then cropped. Resize: straight to the size.
    """
    f = factors(options["factor"])
    sizes = z.shape[1:4]
    if options["ragged"] == "exact":
        ratios = [1 / k for k in f]
    else:
        ratios = [s / t for s, t in zip(sizes, grid, strict=True)]
    kind = options["lift"] or ("bilinear_conv3d" if options["name"] == "depthwise_conv" else "bilinear")
    make = nearest_weights if kind == "nearest" else linear_weights
    up = along(z, [make(sizes[a], grid[a], ratios[a]) for a in range(3)])
    if kind == "bilinear_conv3d":
        up = convolve(up, weights["conv.weight"], weights["conv.bias"])
    return up


def convolve(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3x3x3 cross-correlation with zeros outside the map: (B, T, H, W, D), (D, 1, 3, 3, 3), (D,)."""
    _, t, h, w, _ = z.shape
    out = torch.zeros_like(z) + bias
    for dt, dh, dw in itertools.product((-1, 0, 1), repeat=3):
        tap = weight[:, 0, dt + 1, dh + 1, dw + 1]
        moved = torch.zeros_like(z)
        to = [slice(max(0, -d), min(n, n - d)) for d, n in zip((dt, dh, dw), (t, h, w), strict=True)]
        of = [slice(max(0, d), min(n, n + d)) for d, n in zip((dt, dh, dw), (t, h, w), strict=True)]
        if all(s.start < s.stop for s in to):
            moved[:, to[0], to[1], to[2]] = z[:, of[0], of[1], of[2]]
        out = out + moved * tap
    return out
