"""Cross-shaped windows (CSWin, Dong et al., arXiv:2107.00652, sections 3.2 and 3.3): the first half of the heads attends in
stripes of rows, the rest in stripes of columns; beside the softmax, V convolved 3 x 3 inside its stripe."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, real_keys, scores


def stripe_of(place: list[int], head: int, case: Case) -> tuple[int, int]:
    """The stripe of a token as one head sees it: (group of frames, stripe)."""
    options = plain(case.spec)
    width, frames = options["width"], options["frames"]
    rows = head < (case.site.heads + 1) // 2
    group = 0 if frames == 0 else place[0] // frames
    return (group, place[1 if rows else 2] // width)


def positional(case: Case, v: Tensor, stripes: list[list[tuple[int, int]]], places: list[list[int]]) -> Tensor:
    """(B, N, heads*D): each token's 3 x 3 neighbours in its own frame, those outside its stripe or the frame left out."""
    weight, bias = case.weights["lepe.weight"], case.weights["lepe.bias"]  # (heads*D, 1, 3, 3), (heads*D,)
    size = case.site.head_dim
    if case.key_valid is not None:
        v = v * case.key_valid[..., None, None]
    index = {tuple(place): i for i, place in enumerate(places)}
    heads = []
    for head in range(case.site.heads):
        taps = weight[head * size : (head + 1) * size, 0]
        rows = []
        for i, (t, y, x) in enumerate(places):
            total = bias[head * size : (head + 1) * size].expand(v.shape[0], -1)
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    j = index.get((t, y + dy, x + dx))
                    if j is not None and stripes[head][j] == stripes[head][i]:
                        total = total + v[:, j, head] * taps[:, dy + 1, dx + 1]
            rows.append(total)
        heads.append(torch.stack(rows, dim=1))
    return torch.cat(heads, dim=-1)


def cross_shaped(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, one dense mask per head."""
    at, host = grid_of(case.grid), case.host
    places = [[int(p) for p in row] for row in at.tolist()]
    stripes = [[stripe_of(place, head, case) for place in places] for head in range(case.site.heads)]
    masks = torch.stack([torch.tensor([[a == b for b in row] for a in row]) for row in stripes])

    q, k = (host.split(host.raw(case.x, which), which, at) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    real, count = real_keys(case), len(places)
    logits, values = scores(q, k, masks[None] & real[..., :count]), v
    if case.extra is not None:
        logits = torch.cat([logits, scores(q, case.extra.k, real[..., count:])], dim=-1)
        values = torch.cat([v, case.extra.v], dim=1)
    y = attend(logits, values)
    if plain(case.spec)["lepe"]:
        y = y + positional(case, v, stripes, places)
    out = host.out(y)
    extra = extra_rows(case)
    return out if extra is None else (out, extra)
