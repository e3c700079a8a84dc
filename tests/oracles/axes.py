"""Attention along axes (Ho et al., arXiv:1912.12180; Latte, arXiv:2401.03048): two tokens see each other along a group of axes
when they agree on every other axis. Groups take turns by layer, or their outputs are added or averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, real_keys, scores


def along(axes: str, places: Tensor) -> Tensor:
    """Bool (N, N): the same place on all axes that are not attended along."""
    others = [i for i, name in enumerate(("t", "h", "w")) if name not in axes]
    same = torch.ones(len(places), len(places), dtype=torch.bool)
    for i in others:
        same &= places[:, None, i] == places[None, :, i]
    return same


def axes(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, one dense mask per group."""
    options = plain(case.spec)
    groups: list[str] = options["axes"]
    if options["mode"] == "alternate":
        groups = [groups[case.site.layer % len(groups)]]

    places, host = grid_of(case.grid), case.host
    q, k = (host.split(host.raw(case.x, which), which, places) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    real = real_keys(case)
    count = len(places)
    if case.extra is not None:
        v = torch.cat([v, case.extra.v], dim=1)
    parts = []
    for group in groups:
        logits = scores(q, k, along(group, places) & real[..., :count])
        if case.extra is not None:
            logits = torch.cat([logits, scores(q, case.extra.k, real[..., count:])], dim=-1)
        parts.append(attend(logits, v))
    total = torch.stack(parts).sum(0)
    y = host.out(total / len(parts) if options["mode"] == "mean" else total)
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
