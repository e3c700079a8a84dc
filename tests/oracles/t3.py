"""T3-Video's pair of windows (arXiv:2512.13492): the mean of attention inside contiguous boxes and inside the residue classes of
the same counts; the counts go round with the layer. Published tables by size, and the rule for every other size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, real_keys, scores

# layer mod 5 → windows along T, H, W
TABLES = {
    "wan_1_3b_4k": [(21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6)],
    "wan_5b_4k": [(21, 1, 1), (1, 17, 20), (1, 17, 6), (3, 4, 15), (7, 4, 8)],
}
WHOLE = math.inf
# layer mod 5 → tokens of a window that the rule aims at: those of the first table at (21, 136, 240)
EXTENTS = [(1, WHOLE, WHOLE), (WHOLE, 8, 8), (WHOLE, 17, 6), (7, 8, 30), (3, 17, 40)]


def ruled(length: int, wanted: float) -> int:
    """Windows of an axis: the divisor that brings them nearest to `wanted` tokens, by ratio, the longer of two as near; where
    that misses by more than a factor of two, the nearest number of uneven windows."""
    if wanted >= length:
        return 1
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    miss = {n: max(length / n / wanted, wanted * n / length) for n in divisors}
    best = min(divisors, key=lambda n: (round(miss[n], 9), n))
    return best if miss[best] <= 2 else math.floor(length / wanted + 0.5)


def counts_of(case: Case) -> tuple[int, int, int]:
    options, phase = plain(case.spec), case.site.layer % 5
    given = options["counts"]
    if given is not None:
        numbers = [given, given] if isinstance(given, int) else list(given)
        return tuple([1] * (3 - len(numbers)) + numbers)  # type: ignore[return-value]
    if options["table"] != "auto":
        return TABLES[options["table"]][phase]
    t, h, w = (ruled(n, wanted) for n, wanted in zip(case.grid, EXTENTS[phase], strict=True))
    return (t, h, w)


def box_of(place: int, length: int, count: int) -> int:
    """The window of a place when `count` windows are as even as can be, longer ones first."""
    borders = [sum(length // count + (i < length % count) for i in range(j + 1)) for j in range(count)]
    return next(j for j, end in enumerate(borders) if place < end)


def t3(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention: the mean under two dense masks, both computed even where they are equal."""
    counts = counts_of(case)
    places, host = grid_of(case.grid), case.host
    whole_numbers = [[int(p) for p in row] for row in places.tolist()]

    def same(label: list[Sequence[int]]) -> Tensor:
        return torch.tensor([[tuple(a) == tuple(b) for b in label] for a in label])

    close = same([[box_of(p, n, c) for p, n, c in zip(row, case.grid, counts, strict=True)] for row in whole_numbers])
    remote = same([[p % c for p, c in zip(row, counts, strict=True)] for row in whole_numbers])

    q, k = (host.split(host.raw(case.x, which), which, places) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    real, count = real_keys(case), len(places)
    if case.extra is not None:
        v = torch.cat([v, case.extra.v], dim=1)
    halves = []
    for mask in (close, remote):
        logits = scores(q, k, mask & real[..., :count])
        if case.extra is not None:
            logits = torch.cat([logits, scores(q, case.extra.k, real[..., count:])], dim=-1)
        halves.append(attend(logits, v))
    y = host.out((halves[0] + halves[1]) / 2)
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
