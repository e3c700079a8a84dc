"""Divided space-time attention, one place and one frame at a time (arXiv 2102.05095, section 3.2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ultrazoo.testing import Case, affine, attend, extra_rows, grid_of, scores

NORM_EPS = 1e-6


def over_time(case: Case) -> Tensor:
    """The temporal residual (B, N, C): each token attends to the tokens of its place in all frames."""
    x, (frames, rows, columns) = case.x, case.grid
    normed = x - x.mean(-1, keepdim=True)
    normed = normed / torch.sqrt(normed.square().mean(-1, keepdim=True) + NORM_EPS)
    normed = normed * case.weights["temporal_norm.weight"] + case.weights["temporal_norm.bias"]
    places = grid_of(case.grid)
    q, k = (case.host.split(affine(case.weights, f"temporal.{w}", normed), w, places) for w in "qk")
    v = case.host.split(affine(case.weights, "temporal.v", normed), "v")
    out = torch.zeros(*x.shape[:2], v.shape[2] * v.shape[3], dtype=x.dtype)
    for place in range(rows * columns):
        tokens = [t * rows * columns + place for t in range(frames)]
        real = None if case.key_valid is None else case.key_valid[:, None, None, tokens]
        out[:, tokens] = attend(scores(q[:, tokens], k[:, tokens], real), v[:, tokens])
    return affine(case.weights, "temporal_fc", affine(case.weights, "temporal_proj", out))


def divided(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """What the block adds to the stream: the temporal residual, and attention inside each frame of the sum."""
    if case.key_valid is not None:
        case = replace(case, x=torch.where(case.key_valid[..., None], case.x, torch.zeros_like(case.x)))
    residual = over_time(case)
    inner = replace(case, x=case.x + residual)
    places = grid_of(case.grid)
    q, k = (case.host.split(case.host.raw(inner.x, w), w, places) for w in "qk")
    v = case.host.split(case.host.raw(inner.x, "v"), "v")
    rows = []
    size = case.grid[1] * case.grid[2]
    for t in range(case.grid[0]):
        tokens = slice(t * size, (t + 1) * size)
        keys, values = k[:, tokens], v[:, tokens]
        real = torch.ones(keys.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid[:, tokens]
        if case.extra is not None:
            keys, values = torch.cat([keys, case.extra.k], 1), torch.cat([values, case.extra.v], 1)
            mask = case.extra.key_mask
            more = torch.ones(case.extra.k.shape[:2], dtype=torch.bool) if mask is None else mask
            real = torch.cat([real, more], 1)
        rows.append(attend(scores(q[:, tokens], keys, real[:, None, None]), values))
    y = residual + case.host.out(torch.cat(rows, dim=1))
    extra = extra_rows(inner)
    return y if extra is None else (y, extra)
