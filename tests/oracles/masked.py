"""Attention under a dense mask: what every design comes to whose tokens see a fixed set of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, real_keys, scores


def product_mask(axes: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Bool (N, N), t-major, from the keys of every token of every axis: a token is seen when it is on all three axes."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for keys in axes:
        axis = torch.tensor([[j in seen for j in range(len(keys))] for seen in keys])
        rows, columns = mask.shape
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).reshape(rows * len(keys), columns * len(keys))
    return mask


def masked(case: Case, mask: Tensor, scale: float | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention under `mask`, (N, N) or one per head (heads, N, N); `scale` None means D**-0.5.

    Extra keys are seen by all; extra queries see everything, at the plain scale.
    """
    host, place = case.host, grid_of(case.grid)
    q, k = (host.split(host.raw(case.x, which), which, place) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    many = k.shape[1]
    mask = mask if mask.dim() == 3 else mask[None]
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], dim=1), torch.cat([v, case.extra.v], dim=1)
        mask = torch.cat([mask, torch.ones(*mask.shape[:2], k.shape[1] - many, dtype=torch.bool)], dim=2)
    logits = scores(q, k)
    if scale is not None:
        logits = logits * (scale * math.sqrt(q.shape[-1]))
    y = host.out(attend(logits.masked_fill(~(mask[None] & real_keys(case)), float("-inf")), v))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
