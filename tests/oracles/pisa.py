"""PISA: exact blocks by score + log ||H||, all others by their means, with one global first-order term.

Source: arXiv 2602.01077. ``H_j = sum_{r in j} (k_r - kc_j)^T v_r``; the numerator gains ``(s g / N) q · sum_j H_j`` with
``g`` the far field's part of the denominator; the denominator's own first-order term is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.testing import Case, plain

from .blockwise import Laid, answer, counts, highest, laid_out, means
from .sol import near_and_far, with_means


def block_state(laid: Laid, j: int) -> Tensor:
    """H_j, (B, heads, D, D)."""
    block = laid.key_blocks[j]
    weight = laid.real[:, block].double()[..., None, None]
    keys, values = laid.k[:, block], laid.v[:, block]
    centre = (keys * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("brhc,brhd->bhcd", (keys - centre) * weight, values)


def variance(laid: Laid, j: int) -> Tensor:
    """The trace of the covariance of a block's keys, (B, heads)."""
    block = laid.key_blocks[j]
    weight = laid.real[:, block].double()[..., None, None]
    keys, count = laid.k[:, block], weight.sum(1).clamp(min=1)
    centre = (keys * weight).sum(1) / count
    return ((((keys - centre[:, None]) ** 2) * weight).sum(1) / count).sum(-1)


def key_terms(laid: Laid, score: str) -> Tensor:
    """What is added to the scores of every key block: (B, heads, 1, blocks)."""
    columns = []
    for j in range(len(laid.key_blocks)):
        if score == "norm":
            columns.append((block_state(laid, j).square().sum((-1, -2)).sqrt() + 1e-5).log())
        elif score == "variance":
            columns.append(variance(laid, j).clamp(min=1e-12).log())
        else:
            columns.append(torch.zeros(laid.k.shape[0], laid.k.shape[2]).double())
    return torch.stack(columns, dim=-1)[:, :, None]


def pisa(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`."""
    options = plain(case.spec)
    laid = laid_out(case, options["block"], options["block"])
    s = laid.q.shape[-1] ** -0.5
    qc, kc = means(laid.q, laid.query_blocks, laid.asked), means(laid.k, laid.key_blocks, laid.real)
    n = counts(laid.real, laid.key_blocks)
    scored = s * torch.einsum("bhid,bhjd->bhij", qc, kc) + key_terms(laid, options["score"])
    probability = scored.masked_fill(n[:, :, None] == 0, float("-inf")).softmax(-1)
    blocks = len(laid.key_blocks)
    near, far = near_and_far(laid, highest(probability, lambda n: max(1, int(options["density"] * n + 1e-9)), n > 0))
    y = with_means(laid, near, far)
    if options["order"] == 1:
        state = torch.stack([block_state(laid, j) for j in range(blocks)]).sum(0)
        share = far.sum(-1) / n.sum(-1)[..., None]  # (B, heads, n)
        y = y + s * torch.einsum("bhn,bnhc,bhcd->bnhd", share, laid.q, state)
    return answer(case, laid, y.flatten(2))
