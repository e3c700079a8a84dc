"""SLA2: a learned router, softmax over its choice, linear attention over the rest, joined by a convex weight per head.

Source: arXiv 2602.12675, Algorithm 2. In training the choice is soft: ``sigmoid(P / tau + lambda_i)`` with lambda_i such
that a row adds up to the kept number of blocks; a soft weight multiplies the exponential in the softmax, one minus it the
linear part, which is the hard formula where weights are 0 or 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultrazoo.testing import Case, plain, scores

from .blockwise import Laid, answer, by_token, counts, highest, laid_out, means, weighted_softmax
from .sparse_linear import linear


def soft_choice(p: Tensor, share: float, tau: float, usable: Tensor) -> Tensor:
    """Weights (B, heads, rows, blocks); a row's lambda by halving an interval, then by Newton steps that carry gradients."""
    weights = torch.zeros_like(p)
    for b in range(p.shape[0]):
        may = usable[b, 0].nonzero()[:, 0].tolist()
        kept = max(1.0, share * len(may))
        if kept >= len(may):
            weights[b, :, :, may] = 1.0
            continue
        for h in range(p.shape[1]):
            for i in range(p.shape[2]):
                x = p[b, h, i, may] / tau
                low, high = -float(x.detach().max()) - 60.0, 60.0
                for _ in range(200):
                    middle = (low + high) / 2
                    low, high = (
                        (middle, high) if float(torch.sigmoid(x.detach() + middle).sum()) < kept else (low, middle)
                    )
                shift = torch.tensor((low + high) / 2, dtype=torch.float64)
                for _ in range(3):
                    w = torch.sigmoid(x + shift)
                    shift = shift - (w.sum() - kept) / (w * (1 - w)).sum()
                weights[b, h, i, may] = torch.sigmoid(x + shift)
    return weights


def routed(case: Case, laid: Laid, usable: Tensor) -> Tensor:
    """Weights of block pairs, 0 or 1 where the router is hard."""
    options = plain(case.spec)
    qc, kc = means(laid.q, laid.query_blocks, laid.asked), means(laid.k, laid.key_blocks, laid.real)
    qc, kc = qc @ case.weights["selector.query.weight"].T, kc @ case.weights["selector.key.weight"].T
    scored = torch.einsum("bhid,bhjd->bhij", qc, kc) * laid.q.shape[-1] ** -0.5
    if options["router"] == "hard":
        return highest(scored, lambda blocks: max(1, math.ceil(options["share"] * blocks - 1e-9)), usable).double()
    p = scored.masked_fill(~usable[:, :, None], float("-inf")).softmax(-1)
    return soft_choice(p, options["share"], options["tau"], usable)


def sla2(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`."""
    options = plain(case.spec)
    laid = laid_out(case, *options["block"])
    usable = counts(laid.real, laid.key_blocks) > 0
    # keys in blocks are centred by the mean of all of them
    inside = sorted(j for block in laid.key_blocks for j in block)
    real = laid.real[:, inside].double()[..., None, None]
    centre = (laid.k[:, inside] * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    laid = Laid(
        laid.q, laid.k - centre, laid.v, laid.asked, laid.real, laid.query_blocks, laid.key_blocks, laid.pattern
    )
    weights = routed(case, laid, usable)
    sparse = weighted_softmax(scores(laid.q, laid.k), by_token(weights, laid, 1.0), laid.v)
    rest = linear(laid.q, laid.k, laid.v, by_token(1 - weights, laid, 0.0), options["phi"], 0.0)
    alpha = torch.sigmoid(case.weights["far.alpha"])[:, None]
    return answer(case, laid, (alpha * sparse + (1 - alpha) * rest).flatten(2))
