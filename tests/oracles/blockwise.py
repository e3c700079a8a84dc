"""What the oracles of block-wise designs share: tokens in blocks, means of blocks, choices and masks, all by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrazoo.spec import Segment
from ultrazoo.testing import Case, extra_rows, grid_of

from .blocks import under

Block = list[int]


@dataclass(frozen=True)
class Laid:
    """Queries of the grid and of extra rows that follow the pattern, keys of the grid and all extra tokens.

    q (B, n, heads, D), k and v (B, m, heads, D), asked (B, n) and real (B, m): which of them are valid. Blocks hold
    positions among queries or keys; `key_blocks` may be chosen, keys in none of them are seen by all. `pattern` are the
    extra tokens behind the grid's queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    asked: Tensor
    real: Tensor
    query_blocks: list[Block]
    key_blocks: list[Block]
    pattern: list[int]


def runs(tokens: Sequence[int], size: int) -> list[Block]:
    """Consecutive runs of at most `size`."""
    return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]


def laid_out(
    case: Case,
    block_q: int,
    block_k: int,
    order: Sequence[int] | None = None,
    policies: tuple[str, str] = ("host", "host"),
) -> Laid:
    """Blocks of the grid's tokens in `order` (None: as they are), then of extra tokens by the `policies` of their rows and
    keys."""
    place, count = grid_of(case.grid), case.x.shape[1]
    q = case.host.split(case.host.raw(case.x, "q"), "q", place)
    k = case.host.split(case.host.raw(case.x, "k"), "k", place)
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    real = torch.ones(case.x.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
    asked = real
    order = list(range(count)) if order is None else list(order)
    query_blocks, key_blocks, pattern = runs(order, block_q), runs(order, block_k), []
    extra = case.extra
    if extra is not None:
        more = torch.ones(extra.k.shape[:2], dtype=torch.bool) if extra.key_mask is None else extra.key_mask
        k, v, real = torch.cat([k, extra.k], 1), torch.cat([v, extra.v], 1), torch.cat([real, more], 1)
        at = 0
        for segment in under(case.site.extra or (Segment("extra", extra.k.shape[1]),), *policies):
            tokens = list(range(at, at + segment.length))
            at += segment.length
            if segment.keys == "compete":
                key_blocks += runs([count + i for i in tokens], block_k)
            if segment.rows == "pattern":
                query_blocks += runs([count + len(pattern) + i for i in range(segment.length)], block_k)
                pattern += tokens
        q, asked = torch.cat([q, extra.q[:, pattern]], dim=1), torch.cat([asked, more[:, pattern]], dim=1)
    return Laid(q, k, v, asked, real, query_blocks, key_blocks, pattern)


def answer(case: Case, laid: Laid, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """From rows (B, n, heads*D) in the order of `laid.q` to what a case's oracle returns."""
    count = case.x.shape[1]
    out, dense = case.host.out(y[:, :count]), extra_rows(case)
    if dense is None:
        return out
    rows = [y[:, count + laid.pattern.index(i)] if i in laid.pattern else dense[:, i] for i in range(dense.shape[1])]
    return out, torch.stack(rows, dim=1)


def counts(real: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Real tokens per block: (B, 1, blocks)."""
    return torch.stack([real[:, block].sum(-1) for block in blocks], dim=-1)[:, None].double()


def means(z: Tensor, blocks: Sequence[Block], real: Tensor | None = None) -> Tensor:
    """Means over the real tokens of each block, zero where there is none: (B, n, heads, D) → (B, heads, blocks, D)."""
    out = []
    for block in blocks:
        weight = torch.ones(z.shape[0], len(block)).double() if real is None else real[:, block].double()
        total = (z[:, block] * weight[..., None, None]).sum(1)
        out.append(total / weight.sum(-1).clamp(min=1)[:, None, None])
    return torch.stack(out, dim=2)


def highest(scores: Tensor, number: Callable[[int], int], usable: Tensor) -> Tensor:
    """Bool: the highest of every row of (B, heads, rows, blocks), ``number(usable blocks)`` of them; of equal ones the first;
    only `usable` ones, (B, 1, blocks)."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for b in range(scores.shape[0]):
        may = usable[b, 0].tolist()
        count = number(sum(may))
        for h in range(scores.shape[1]):
            for i, row in enumerate(scores[b, h].detach().tolist()):
                ranked = sorted((j for j in range(len(row)) if may[j]), key=lambda j, row=row: (-row[j], j))
                chosen[b, h, i, ranked[:count]] = True
    return chosen


def by_token(weights: Tensor, laid: Laid, others: float) -> Tensor:
    """Weights of block pairs (B, heads, query blocks, key blocks) for every pair of tokens (B, heads, n, m); keys that
    are in no block get `others`, keys that are not real get nothing."""
    n, m = laid.q.shape[1], laid.k.shape[1]
    rows = torch.full((n,), -1)
    for i, block in enumerate(laid.query_blocks):
        rows[block] = i
    assert bool((rows >= 0).all())
    out = torch.full((*weights.shape[:2], n, m), others, dtype=torch.float64)
    columns = weights.double()[:, :, rows]
    pieces = {j: key for key, block in enumerate(laid.key_blocks) for j in block}
    out = torch.stack([columns[..., pieces[j]] if j in pieces else out[..., j] for j in range(m)], dim=-1)
    return out * laid.real[:, None, None, :]


def weighted_softmax(logits: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    """``sum_j w_ij e^{l_ij} v_j / sum_j w_ij e^{l_ij}``: (B, heads, n, m), (B, m, heads, D) → (B, n, heads, D); no weight
    at all: zeros."""
    largest = logits.masked_fill(weights == 0, float("-inf")).amax(-1, keepdim=True).detach()
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    share = weights * torch.exp((logits - largest).masked_fill(weights == 0, 0.0))
    total = share.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", share / total.masked_fill(total == 0, 1.0), v)
