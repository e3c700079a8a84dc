"""Queries on the whole grid, keys and values on a smaller one: what attentions that compress keys have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.partition import AxisRule
from ..ops.pool import coarse_size
from ..ops.runs import whole
from ..spec import BranchCost, Cost, Site
from .contract import Extra, Positions
from .grouped import attend_cuts, attend_rules

WHOLE = (AxisRule("whole"),) * 3


def cell_positions(grid: Sequence[int], cell: Sequence[int], where: str, device: torch.device) -> Positions:
    """Coordinates of the cells that cover `grid`: ``centre`` of a cell (of a partial one: as if it were whole), its
    ``index``, or the place of its ``first`` token."""
    axes = []
    for length, factor in zip(grid, cell, strict=True):
        at = torch.arange(coarse_size(length, factor), device=device, dtype=torch.float32)
        if where != "index":
            at = at * factor + ((factor - 1) / 2 if where == "centre" else 0)
        axes.append(at)
    return Positions(axes[0], axes[1], axes[2])


def mean_of_real(mean: Tensor, share: Tensor) -> Tensor:
    """The mean of a cell's real tokens, from its `mean` with zeros for the others and the `share` that is real, in fp32
    or wider. A cell without any stays zero."""
    return (mean / torch.where(share > 0, share, 1.0)).to(mean.dtype)


def attend_fewer(
    q: Tensor, k: Tensor, v: Tensor, *, extra: Extra | None, key_valid: Tensor | None, kernel: str, traced: bool
) -> Tensor:
    """Every query sees every key and every extra key: q (B, T, H, W, heads, D), k and v (B, t, h, w, heads, D) →
    (B, N, heads*D). key_valid (B, t, h, w) is False where a key is not real."""
    common: dict[str, Any] = {"extra": extra, "key_valid": key_valid, "kernel": kernel}
    if traced:
        y, _ = attend_rules(q, k, v, WHOLE, WHOLE, same_grid=False, **common)
    else:
        (a, b, c), (d, e, f) = q.shape[1:4], k.shape[1:4]
        y, _ = attend_cuts(q, k, v, (whole(a), whole(b), whole(c)), (whole(d), whole(e), whole(f)), **common)
    return y.flatten(1, 3).flatten(2)


def fewer_cost(
    site: Site, keys: int, *, name: str, qkv: int, projections: int = 0, other: int = 0, parameters: int = 0
) -> Cost:
    """Cost of N queries on `keys` keys; extra queries see all N. The host projects the input `qkv` times (of 3)."""
    tokens, extra, width = site.tokens, site.extra_tokens, site.width
    pairs = tokens * (keys + extra) + extra * (tokens + extra)
    attention = 4 * pairs * site.inner
    one = 2 * tokens * site.dim * width
    return Cost(
        pairs=pairs,
        attention_flops=attention,
        qkv_flops=qkv * one,
        projection_flops=projections,
        out_flops=2 * tokens * site.inner * site.dim,
        other_flops=other,
        parameters=parameters,
        # raw projections and what became of them, both of queries and of what is projected at full resolution; the smaller
        # map, its norm, and keys and values before and after
        peak_elements=(2 + qkv) * tokens * width + 6 * keys * width,
        # the input, the host's projections (once more before a norm), the output; compressed keys before and after
        saved_elements=(2 + qkv + 2 * site.qk_norm) * tokens * width + 4 * keys * width + tokens * site.heads,
        branches=(BranchCost(name, pairs, attention, qkv * one + projections, other, parameters),),
    )
