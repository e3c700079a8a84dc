"""Sol-Attn: exact blocks above mean + tau · standard deviation, block means for all others, in one softmax.

Source: arXiv 2607.24027 and the published code's behaviour: ``num = sum_M e^{s q.k} v + sum_{1-M} e^{s q.kc_j} vs_j``,
``den = sum_M e^{s q.k} + sum_{1-M} n_j e^{s q.kc_j}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, plain, scores

from .blockwise import Laid, answer, by_token, counts, laid_out, means


def morton(grid: tuple[int, int, int]) -> list[int]:
    """Tokens by their code of interleaved bits … t1 h1 w1 t0 h0 w0."""
    codes = {}
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                bits = "".join(f"{t >> b & 1}{h >> b & 1}{w >> b & 1}" for b in reversed(range(12)))
                codes[int(bits, 2)] = (t * grid[1] + h) * grid[2] + w
    return [codes[code] for code in sorted(codes)]


def chosen_blocks(laid: Laid, options: Mapping[str, Any], scale: float) -> Tensor:
    """Bool (B, heads, query blocks, key blocks)."""
    qc, kc = means(laid.q, laid.query_blocks, laid.asked), means(laid.k, laid.key_blocks, laid.real)
    n = counts(laid.real, laid.key_blocks)
    usable = (n > 0).double()[..., None]  # (B, 1, Gk, 1)
    some = usable.sum(2)
    centre = (kc * usable).sum(2) / some  # (B, heads, D)
    mu = scale * torch.einsum("bhid,bhd->bhi", qc, centre)
    if options["moments"] == "diag":
        spread = ((kc - centre[:, :, None]) ** 2 * usable).sum(2) / some
        var = scale**2 * torch.einsum("bhic,bhc->bhi", qc**2, spread)
    else:
        second = torch.einsum("bhjc,bhjd->bhcd", kc * usable, kc) / some[..., None]
        var = scale**2 * torch.einsum("bhic,bhcd,bhid->bhi", qc, second, qc) - mu**2
    threshold = mu + options["tau"] * (var.clamp(min=0) + 1e-6).sqrt()
    row_means = scale * torch.einsum("bhid,bhjd->bhij", qc, kc)
    chosen = row_means > threshold[..., None]
    for i in range(len(laid.query_blocks)):
        for j, block in enumerate(laid.key_blocks):
            if abs(i - j) <= options["band"]:
                chosen[:, :, i, j] = True
            if options["sink"] and any(0 <= token - options["sink"][0] < options["sink"][1] for token in block):
                chosen[:, :, i, j] = True
    return chosen & (n[:, :, None] > 0)


def near_and_far(laid: Laid, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Joint weights of exact keys (B, heads, n, m) and of block means (B, heads, n, Gk) that add up to 1 per row."""
    scale = laid.q.shape[-1] ** -0.5
    n = counts(laid.real, laid.key_blocks)
    kc = means(laid.k, laid.key_blocks, laid.real)
    exact = scores(laid.q, laid.k, by_token(chosen, laid, 1.0) > 0)
    rows = torch.zeros(laid.q.shape[1], dtype=torch.long)
    for i, block in enumerate(laid.query_blocks):
        rows[block] = i
    far = scale * torch.einsum("bnhd,bhjd->bhnj", laid.q, kc) + n[:, :, None].log()
    far = far.masked_fill(chosen[:, :, rows], float("-inf"))
    joint = torch.cat([exact, far], dim=-1).softmax(-1)
    return joint[..., : exact.shape[-1]], joint[..., exact.shape[-1] :]


def with_means(laid: Laid, near: Tensor, far: Tensor) -> Tensor:
    """(B, n, heads, D)."""
    vc = means(laid.v, laid.key_blocks, laid.real)
    return torch.einsum("bhnm,bmhd->bnhd", near, laid.v) + torch.einsum("bhnj,bhjd->bnhd", far, vc)


def sol(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`."""
    options = plain(case.spec)
    order = morton(case.grid) if options["order"] == "morton" else None
    laid = laid_out(case, options["block"], options["block"], order)
    shape = (laid.q.shape[0], laid.q.shape[2], len(laid.query_blocks), len(laid.key_blocks))
    if options["tau"] is None:
        chosen = torch.ones(shape, dtype=torch.bool)
    else:
        chosen = chosen_blocks(laid, options, laid.q.shape[-1] ** -0.5)
    near, far = near_and_far(laid, chosen)
    return answer(case, laid, with_means(laid, near, far).flatten(2))
