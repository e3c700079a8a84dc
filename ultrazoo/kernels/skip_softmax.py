"""Skip-softmax (BLASST, arXiv 2512.12087): a tile of keys is left out where none of its weights could matter. Lossy.

Tiles of keys are taken in order with a running maximum m per query row. After ``q k^T`` and the update of m, a tile is skipped
iff ``exp(tile maximum - m) < threshold`` for every row of the query tile: neither the sum nor the output sees it. The first
tiles of a row are never skipped, so the order of keys matters. 0 skips nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.graphs import outside_graphs
from .door import Inputs, KernelSpec
from .sdpa import additive

TILE = 128
SCORE_BYTES = 1 << 26
"""Bytes of scores held at a time."""


@dataclass(frozen=True, kw_only=True)
class SkipSoftmaxSpec(KernelSpec):
    """The rule in plain arithmetic, tile by tile, on every device; runs by name alone."""

    name: ClassVar[str] = "skip_softmax"
    source: ClassVar[str] = "BLASST, arXiv 2512.12087"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu", "meta")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    takes: ClassVar[frozenset[str]] = frozenset({"key_mask", "log_weight", "unequal", "threshold"})
    needs: ClassVar[frozenset[str]] = frozenset({"threshold"})
    exact: ClassVar[bool] = False
    beside: ClassVar[Mapping[str, Any]] = {"name": "skip_softmax"}

    @classmethod
    @outside_graphs
    def run(cls, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        batch, heads, queries = inputs.q.shape[:3]
        whole = queries // TILE
        # (B, heads, query tiles, tile, D), and the short tile at the end by itself
        tiles = inputs.q[:, :, : whole * TILE].unflatten(2, (whole, TILE))
        step = max(1, SCORE_BYTES // (batch * heads * TILE * TILE * 4))
        parts = [_rows(tiles[:, :, lo : lo + step], inputs).flatten(2, 3) for lo in range(0, whole, step)]
        if queries > whole * TILE:
            parts.append(_rows(inputs.q[:, :, None, whole * TILE :], inputs)[:, :, 0])
        return torch.cat(parts, dim=2).to(inputs.q.dtype), None


def _rows(q: Tensor, inputs: Inputs) -> Tensor:
    """Some query tiles against every key tile in order: (B, heads, tiles, tile, Dv)."""
    threshold = inputs.threshold
    assert threshold is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    mask = additive(inputs)
    q = q.to(wide) * scale
    top = torch.full((*q.shape[:4], 1), float("-inf"), device=q.device, dtype=wide)
    total = torch.zeros_like(top)
    out = torch.zeros(*q.shape[:4], inputs.v.shape[-1], device=q.device, dtype=wide)
    for start in range(0, inputs.k.shape[2], TILE):
        keys = slice(start, start + TILE)
        scores = q @ inputs.k[:, :, None, keys].to(wide).transpose(-1, -2)
        if mask is not None:
            part = mask[..., keys].unsqueeze(2)
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part.to(wide)
        highest = scores.detach().amax(-1, keepdim=True)
        new = torch.maximum(top, highest)
        # a row that has seen no key yet has no maximum to subtract
        safe = new.masked_fill(new == float("-inf"), 0.0)
        small = (highest - safe).exp() < threshold
        kept = ~small.all(3, keepdim=True)
        if bool(kept.any()):
            weights = (scores - safe).exp() * kept
            fade = (top - safe).exp()
            total = total * fade + weights.sum(-1, keepdim=True)
            out = out * fade + weights @ inputs.v[:, :, None, keys].to(wide)
            top = new
    return out / total.clamp(min=torch.finfo(wide).tiny)
