"""Rolling-window attention from its definition: one dense mask over all tokens, fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, grid_of, scores


def rolling(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Frame j is seen from frame i iff it is not beyond the end of i's chunk plus ahead, and is a sink or in the window."""
    spec, (frames, h, w) = case.spec, case.grid
    frame_sees = torch.zeros(frames, frames, dtype=torch.bool)
    for i in range(frames):
        start = (i // spec.chunk) * spec.chunk
        for j in range(frames):
            reached = j < start + spec.chunk + spec.ahead
            frame_sees[i, j] = reached and (j < spec.sinks or j >= start - spec.window)
    token_frame = torch.arange(frames * h * w) // (h * w)
    allowed = frame_sees[token_frame][:, token_frame][None, None]

    place = grid_of(case.grid)
    q = case.host.split(case.host.raw(case.x, "q"), "q", place)
    k = case.host.split(case.host.raw(case.x, "k"), "k", place)
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    batch, tokens = case.x.shape[:2]
    real = torch.ones(batch, tokens, dtype=torch.bool) if case.key_valid is None else case.key_valid
    if case.extra is None:
        return case.host.out(attend(scores(q, k, allowed & real[:, None, None]), v))

    many = case.extra.k.shape[1]
    extra_real = torch.ones(batch, many, dtype=torch.bool) if case.extra.key_mask is None else case.extra.key_mask
    k, v = torch.cat([k, case.extra.k], dim=1), torch.cat([v, case.extra.v], dim=1)
    real = torch.cat([real, extra_real], dim=1)[:, None, None]
    seen = torch.cat([allowed, torch.ones(1, 1, tokens, many, dtype=torch.bool)], dim=-1)
    y = case.host.out(attend(scores(q, k, seen & real), v))
    return y, attend(scores(case.extra.q, k, real), v)
