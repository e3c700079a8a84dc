"""SLA: softmax over the chosen blocks, plus a projection of linear attention over all keys or over the ones between.

Source: arXiv 2509.24006 (complement without the lowest share) and the code released with it (all keys). Linear attention
is written pair by pair, ``sum_j phi(q) phi(k_j) v_j / (eps + sum_j phi(q) phi(k_j))``, without states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultrazoo.testing import Case, affine, attend, plain, scores

from .blockwise import answer, by_token, counts, highest, laid_out, means


def feature(z: Tensor, phi: str) -> Tensor:
    if phi == "relu":
        return z.clamp(min=0)
    if phi == "elu":
        return torch.where(z > 0, z, torch.exp(z.clamp(max=0)) - 1) + 1
    largest = z.amax(-1, keepdim=True)
    return torch.exp(z - largest) / torch.exp(z - largest).sum(-1, keepdim=True)


def linear(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, phi: str, eps: float) -> Tensor:
    """Linear attention with a weight per pair of tokens (B, heads, n, m): (B, n, heads, D); no weight at all: zeros."""
    pairs = weights * torch.einsum("bnhc,bmhc->bhnm", feature(q, phi), feature(k, phi))
    total = pairs.sum(-1).transpose(1, 2)[..., None]
    return torch.einsum("bhnm,bmhd->bnhd", pairs, v) / torch.where(total > 0, total + eps, torch.ones_like(total))


def share_of(share: float, blocks: int) -> int:
    """int(share · blocks), and a share that is whole but for rounding is whole."""
    return math.floor(share * blocks + 1e-9)


def sparse_linear(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Either form, from `plain(spec)`; options that are null stand for the form's own."""
    options = plain(case.spec)
    paper = options["form"] == "paper"
    block = options["block"] or ([64, 64] if paper else [128, 64])
    share = options["share"] or (0.05 if paper else 0.2)
    skip = options["skip"] if options["skip"] is not None else (0.1 if paper else 0.0)
    laid = laid_out(case, block[0], block[1])
    n = counts(laid.real, laid.key_blocks)
    qc, kc = means(laid.q, laid.query_blocks, laid.asked), means(laid.k, laid.key_blocks, laid.real)
    scored = torch.einsum("bhid,bhjd->bhij", qc, kc) * laid.q.shape[-1] ** -0.5

    def kept(blocks: int) -> int:
        return min(blocks, max(1, share_of(share, blocks)))

    chosen = highest(scored, kept, n > 0)
    sparse = attend(scores(laid.q, laid.k, by_token(chosen, laid, 1.0) > 0), laid.v)
    if paper:
        # of the others all but the lowest
        between = highest(scored, lambda blocks: max(kept(blocks), blocks - share_of(skip, blocks)), n > 0) & ~chosen
        weights = by_token(between, laid, 0.0)
    else:
        weights = by_token(torch.ones_like(chosen), laid, 1.0)
    rest = linear(laid.q, laid.k, laid.v, weights, options["phi"], 1e-5)
    y = sparse + affine(case.weights, "far.proj", rest).flatten(2)
    return answer(case, laid, y)
