"""Block-sparse attention in fp64: a dense mask of tokens from the chosen blocks, and what the other blocks give.

Sources: VSA (arXiv 2505.13389) for the coarse far field, Sol-Attn (2607.24027) and PISA (2602.01077, order 0) for the mean
one: a block that was not chosen is one key, its mean, as heavy as the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrazoo.spec import Segment
from ultrazoo.testing import Case, affine, attend, extra_rows, grid_of, plain, scores

from .blocks import Block, Layout, layout, under
from .selection import Looked, choose, means


@dataclass
class Tokens:
    """All tokens of a case, grid then extra: q, k, v (B, n, heads, D) and which are real (B, n)."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, case: Case) -> Tokens:
        place, host = grid_of(case.grid), case.host
        q = host.split(host.raw(case.x, "q"), "q", place)
        k = host.split(host.raw(case.x, "k"), "k", place)
        v = host.split(host.raw(case.x, "v"), "v")
        real = torch.ones(q.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
        if case.extra is None:
            return cls(q, k, v, real, ())
        extra = case.extra
        there = torch.ones(extra.k.shape[:2], dtype=torch.bool) if extra.key_mask is None else extra.key_mask
        return cls(
            torch.cat([q, extra.q], 1),
            torch.cat([k, extra.k], 1),
            torch.cat([v, extra.v], 1),
            torch.cat([real, there], 1),
            under(
                case.site.extra or (Segment("text", extra.k.shape[1]),),
                *(plain(case.spec).get(name, "host") for name in ("extra_rows", "extra_keys")),
            ),
        )


def chosen_blocks(case: Case, step: int | None = None) -> tuple[Layout, Tensor]:
    """The blocks of a case, and which key blocks each query block sees: bool (B, heads, query blocks, key blocks)."""
    options, tokens = plain(case.spec), Tokens.of(case)
    where = layout(options["order"], case.grid, tokens.segments)
    seen = Looked(where, case.grid, tokens.q, tokens.k, tokens.v, tokens.real, case.own("selector."), step)
    found = choose(options["selector"], seen)
    always = torch.ones(*found.shape[:3], len(where.keys) - where.selectable, dtype=torch.bool)
    return where, torch.cat([found, always], -1)


def token_mask(where: Layout, chosen: Tensor, tokens: int) -> Tensor:
    """Chosen blocks → bool (B, heads, tokens, tokens); rows of tokens in no query block see nothing."""
    mask = torch.zeros(*chosen.shape[:2], tokens, tokens, dtype=torch.bool)
    for i, query in enumerate(where.queries):
        for j, key in enumerate(where.keys):
            for token in query:
                mask[:, :, token, key] = chosen[:, :, i, j, None]
    return mask


def block_sparse(case: Case, step: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`; `step` is the sampler's index."""
    options, tokens = plain(case.spec), Tokens.of(case)
    where, chosen = chosen_blocks(case, step)
    mask = token_mask(where, chosen, tokens.q.shape[1]) & tokens.real[:, None, None, :]
    rows = far_field(options["far"], case, tokens, where, chosen, scores(tokens.q, tokens.k, mask))

    count = case.x.shape[1]
    y = case.host.out(rows[:, :count])
    dense = extra_rows(case)
    if dense is None:
        return y
    follows = [token - count for token in where.query_tokens if token >= count]
    extra = [rows[:, count + i] if i in follows else dense[:, i] for i in range(dense.shape[1])]
    return y, torch.stack(extra, 1) if extra else dense


# --- far fields -----------------------------------------------------------------------------------------------------


def far_field(
    far: Mapping[str, Any], case: Case, tokens: Tokens, where: Layout, chosen: Tensor, near: Tensor
) -> Tensor:
    """(B, n, heads*D) from the logits of chosen keys (B, heads, n, n) and what the far field adds."""
    if far["name"] == "drop":
        return attend(near, tokens.v)
    if far["name"] == "mean":
        return with_means(tokens, where, chosen, near, far["order"])
    assert far["name"] == "coarse"
    fine = attend(near, tokens.v)
    broad = coarse(tokens, where)
    if far["gate"] == "none":
        return fine + broad
    gate = affine(case.own("far."), "gate", case.x)
    if far["gate"] == "sigmoid":
        gate = torch.sigmoid(gate)
    # extra tokens have no hidden state here, and none of their rows is read
    rest = torch.zeros(gate.shape[0], fine.shape[1] - gate.shape[1], gate.shape[2], dtype=gate.dtype)
    return fine + torch.cat([gate, rest], 1) * broad


def block_means(z: Tensor, blocks: Sequence[Block], real: Tensor) -> tuple[Tensor, Tensor]:
    """Means over real tokens (B, blocks, heads, D), zero where there is none, and how many there are (B, blocks)."""
    batch, _, heads, channels = z.shape
    rows, counts = [], []
    for b in range(batch):
        found = means(z[b].flatten(1), blocks, real[b])
        rows.append(torch.stack([torch.zeros_like(z[b, 0].flatten()) if m is None else m for m in found]))
        counts.append([sum(bool(real[b, token]) for token in block) for block in blocks])
    return torch.stack(rows).reshape(batch, len(blocks), heads, channels), torch.tensor(counts, dtype=torch.float64)


def with_means(tokens: Tokens, where: Layout, chosen: Tensor, near: Tensor, order: int) -> Tensor:
    """One softmax: chosen keys as they are, every other block as one key with log n_j added to its logit.

    Order 1 adds ``(s g / N) q · sum_j H_j`` to the numerator: g is the other blocks' part of the denominator, N the keys
    that may be chosen.
    """
    k, counts = block_means(tokens.k, where.keys, tokens.real)
    v, _ = block_means(tokens.v, where.keys, tokens.real)
    left_out = torch.zeros(*near.shape[:3], len(where.keys), dtype=torch.bool)
    for i, query in enumerate(where.queries):
        left_out[:, :, query] = ~chosen[:, :, i, None, :]
    left_out = left_out & (counts > 0)[:, None, None, :]
    weight = torch.log(counts.clamp(min=1))[:, None, None, :]
    logits = torch.cat([near, scores(tokens.q, k, left_out) + weight], -1)
    y = attend(logits, torch.cat([tokens.v, v], 1))
    if order == 0:
        return y
    # the share of the softmax that the other blocks have: the same softmax of values that say which key is a block
    which = torch.cat([torch.zeros_like(tokens.v), torch.ones_like(v)], 1)
    spread = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=torch.float64)
    for b in range(k.shape[0]):
        for j, block in enumerate(where.keys[: where.selectable]):
            for token in block:
                if tokens.real[b, token]:
                    centred = tokens.k[b, token] - k[b, j]
                    spread[b] = spread[b] + centred[:, :, None] * tokens.v[b, token][:, None, :]
    keys = counts[:, : where.selectable].sum(-1).clamp(min=1)[:, None, None, None]
    change = torch.einsum("bnhd,bhde->bnhe", tokens.q, spread / keys) / tokens.q.shape[-1] ** 0.5
    return y + attend(logits, which) * change.flatten(2)


def coarse(tokens: Tokens, where: Layout) -> Tensor:
    """Softmax among block means, the answer of a query block given to each of its tokens: (B, n, heads*D)."""
    q, _ = block_means(tokens.q, where.queries, tokens.real)
    k, counts = block_means(tokens.k, where.keys, tokens.real)
    v, _ = block_means(tokens.v, where.keys, tokens.real)
    answers = attend(scores(q, k, (counts > 0)[:, None, None, :]), v)
    rows = [torch.zeros_like(answers[:, 0])] * tokens.q.shape[1]
    for i, query in enumerate(where.queries):
        for token in query:
            rows[token] = answers[:, i]
    return torch.stack(rows, 1)
