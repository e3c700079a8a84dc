"""Shifted windows with a relative position bias, token by token (Liu et al., arXiv:2103.14030, equations 3 and 4; Video Swin,
arXiv:2106.13230): on odd layers the window borders lie half a window later, and the ends are windows of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, real_keys, scores


def extents(case: Case) -> tuple[int | None, int, int]:
    """Tokens of a window along T, H, W; None where windows span all frames."""
    window = plain(case.spec)["window"]
    if isinstance(window, int):
        return (None, window, window)
    return (None, *window) if len(window) == 2 else tuple(window)  # type: ignore[return-value]


def window_of(place: int, length: int, window: int | None, shifted: bool) -> int:
    """The window of one place on an axis. An axis that one window covers is not shifted."""
    if window is None or length <= window:
        return 0
    return (place - (window // 2 if shifted else 0)) // window


def biased(case: Case) -> bool:
    """Is there a table? Left to itself, only where the host does not rotate."""
    wanted = plain(case.spec)["bias"]
    return case.site.rope is None if wanted == "auto" else bool(wanted)


def bias_of(case: Case, places: list[tuple[int, ...]]) -> Tensor:
    """(heads, N, N): the table's entry for the offset of each pair, zero where the offset leaves the table."""
    table = case.weights["bias_table"]
    t, h, w = extents(case)
    frames = t or 1
    rows = torch.zeros(len(places), len(places), dtype=torch.long)
    inside = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (ti, hi, wi) in enumerate(places):
        for j, (tj, hj, wj) in enumerate(places):
            dt, dh, dw = (0 if t is None else ti - tj), hi - hj, wi - wj
            if abs(dt) < frames and abs(dh) < h and abs(dw) < w:
                rows[i, j] = ((dt + frames - 1) * (2 * h - 1) + dh + h - 1) * (2 * w - 1) + dw + w - 1
                inside[i, j] = True
    return (table[rows] * inside[..., None]).movedim(-1, 0)


def swin(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention under one dense mask."""
    shifted = case.site.layer % 2 == 1
    places = [tuple(int(p) for p in row) for row in grid_of(case.grid).tolist()]
    labels = [
        tuple(window_of(p, n, w, shifted) for p, n, w in zip(place, case.grid, extents(case), strict=True))
        for place in places
    ]
    together = torch.tensor([[a == b for b in labels] for a in labels])

    host, at = case.host, grid_of(case.grid)
    q, k = (host.split(host.raw(case.x, which), which, at) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    real = real_keys(case)
    count = len(places)
    logits = scores(q, k, together & real[..., :count])
    if biased(case):
        logits = logits + bias_of(case, places)
    if case.extra is not None:
        logits = torch.cat([logits, scores(q, case.extra.k, real[..., count:])], dim=-1)
        v = torch.cat([v, case.extra.v], dim=1)
    y = host.out(attend(logits, v))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
