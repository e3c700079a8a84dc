"""Full attention in fp64: the dense formula, with extra tokens and invalid keys. Parts of it serve other oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case
from .reference import attend, grid_of, scores


def real_keys(case: Case) -> Tensor | None:
    """Bool (B, 1, 1, N + M): which of the grid's and the extra tokens may be keys."""
    batch, tokens = case.x.shape[:2]
    columns = [torch.ones(batch, tokens, dtype=torch.bool) if case.key_valid is None else case.key_valid]
    if case.extra is not None:
        many = case.extra.k.shape[1]
        mask = case.extra.key_mask
        columns.append(torch.ones(batch, many, dtype=torch.bool) if mask is None else mask)
    return torch.cat(columns, dim=1)[:, None, None, :]


def extra_rows(case: Case) -> Tensor | None:
    """What the extra queries get: softmax over all full-resolution grid keys and all real extra keys."""
    if case.extra is None:
        return None
    place = grid_of(case.grid)
    k = torch.cat([case.host.split(case.host.raw(case.x, "k"), "k", place), case.extra.k], dim=1)
    v = torch.cat([case.host.split(case.host.raw(case.x, "v"), "v"), case.extra.v], dim=1)
    return attend(scores(case.extra.q, k, real_keys(case)), v)


def dense_heads(case: Case) -> Tensor:
    """Grid rows before the output projection: (B, N, heads*D)."""
    place = grid_of(case.grid)
    q = case.host.split(case.host.raw(case.x, "q"), "q", place)
    k = case.host.split(case.host.raw(case.x, "k"), "k", place)
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], dim=1), torch.cat([v, case.extra.v], dim=1)
    return attend(scores(q, k, real_keys(case)), v)


def dense(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Full attention of a case: (B, N, C), or (y, y_extra) iff it has extra tokens."""
    y = case.host.out(dense_heads(case))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
