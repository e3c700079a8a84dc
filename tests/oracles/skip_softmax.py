"""Skip-softmax in fp64: one query tile and one key tile after the other, with a running maximum per row."""

from __future__ import annotations

import math
from typing import Any

import torch

from ultrazoo.testing import Case, plain

from .grouped_tokens import answer, heads_of

TILE = 128


def skip_softmax(case: Case) -> Any:
    options = plain(case.spec)
    q, k, v, real = heads_of(case)
    threshold = options["threshold"]
    if threshold is None:
        threshold = 0.001 if options["scale_factor"] is None else options["scale_factor"] / k.shape[1]
    batch, tokens, heads, size = q.shape
    rows = []
    for start in range(0, tokens, TILE):
        block = q[:, start : start + TILE]
        by_head = []
        for b in range(batch):
            for h in range(heads):
                one = block[b, :, h]
                top = torch.full((len(one), 1), -math.inf, dtype=q.dtype)
                total = torch.zeros(len(one), 1, dtype=q.dtype)
                out = torch.zeros(len(one), size, dtype=q.dtype)
                for first in range(0, k.shape[1], TILE):
                    tile = slice(first, first + TILE)
                    logits = one @ k[b, tile, h].T / math.sqrt(size)
                    logits = logits.masked_fill(~real[b, tile], -math.inf)
                    high = logits.detach().amax(1, keepdim=True)
                    new = torch.maximum(top, high)
                    base = torch.where(new == -math.inf, torch.zeros_like(new), new)
                    if bool(((high - base).exp() < threshold).all()):
                        continue
                    fade, weights = (top - base).exp(), (logits - base).exp()
                    total = fade * total + weights.sum(1, keepdim=True)
                    out = fade * out + weights @ v[b, tile, h]
                    top = new
                by_head.append(out / total.clamp(min=1e-300))
        rows.append(torch.stack(by_head).unflatten(0, (batch, heads)))
    y = torch.cat(rows, dim=2).transpose(1, 2).flatten(2)
    return answer(case, y)
