"""Windows beside a low-resolution proxy (our reading of AtlasVid, arXiv:2605.16649), token by token, pooled before projection."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, scores


def window_of(length: int, most: int) -> list[int]:
    """The window of every token of an axis: as few as keep to `most` tokens, longer ones first."""
    count = (length + most - 1) // most
    sizes = [length // count + (1 if i < length % count else 0) for i in range(count)]
    return [j for j, size in enumerate(sizes) for _ in range(size)]


def cells_near(window: list[int], which: int, cell: Fraction, margin: Any, count: int) -> set[int]:
    """Cells under the tokens of a window, and those around them."""
    if margin == "full":
        return set(range(count))
    mine = [p for p, one in enumerate(window) if one == which]
    under = {c for c in range(count) if any(c * cell < p + 1 and p < (c + 1) * cell for p in mine)}
    return {c for c in range(count) if min(under) - margin <= c <= max(under) + margin}


def allowed(case: Case, sizes: list[Fraction], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Bool (N, N) of tokens and (N, P) of cells that every token sees."""
    options = plain(case.spec)
    most = options["window"] or list(case.host.rope.trained)  # type: ignore[union-attr]
    windows = [window_of(n, m) for n, m in zip(case.grid, most, strict=True)]
    near = [
        [cells_near(w, one, f, options["margin"], c) for one in w]
        for w, f, c in zip(windows, sizes, counts, strict=True)
    ]
    places = [[int(p) for p in row] for row in grid_of(case.grid).tolist()]
    cells = [[int(p) for p in row] for row in grid_of(counts).tolist()]
    tokens = torch.tensor(
        [[all(w[a] == w[b] for w, a, b in zip(windows, p, o, strict=True)) for o in places] for p in places]
    )
    proxies = torch.tensor(
        [[all(c in n[a] for n, a, c in zip(near, p, o, strict=True)) for o in cells] for p in places]
    )
    return tokens, proxies


def pooled(case: Case, cell: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean x of every cell's real tokens (B, P, C), how many those are (B, P), and where all its tokens lie (P, 3)."""
    batch = case.x.shape[0]
    valid = torch.ones(case.x.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
    places = [[int(p) for p in row] for row in grid_of(case.grid).tolist()]
    counts = [math.ceil(n / f) for n, f in zip(case.grid, cell, strict=True)]
    means, many, at = [], [], []
    for row in grid_of(counts).tolist():
        inside = [
            i for i, p in enumerate(places) if all(a // f == int(c) for a, f, c in zip(p, cell, row, strict=True))
        ]
        real = valid[:, inside].double()
        many.append(real.sum(1))
        means.append((case.x[:, inside] * real[..., None]).sum(1) / real.sum(1).clamp(min=1)[:, None])
        at.append([sum(places[i][axis] for i in inside) / len(inside) for axis in range(3)])
    assert len(means) * batch == sum(len(m) for m in many)
    return torch.stack(means, 1), torch.stack(many, 1), torch.tensor(at, dtype=torch.float64)


def grid_rows(
    case: Case, k: Tensor, v: Tensor, weight: Tensor, cells: tuple[Tensor, Tensor], others: Tensor | None
) -> Tensor:
    """Rows of the grid: own window, proxies k, v (B, P, heads, D) with their logarithms `weight` (B, P), and other keys.

    `others` picks the extra tokens that everybody sees.
    """
    host, place = case.host, grid_of(case.grid)
    q, own = (host.split(host.raw(case.x, which), which, place) for which in "qk")
    value = host.split(host.raw(case.x, "v"), "v")
    tokens, proxies = (mask[None, None] for mask in cells)
    if case.key_valid is not None:
        tokens = tokens & case.key_valid[:, None, None]
    logits = [scores(q, own, tokens), scores(q, k, proxies) + weight[:, None, None]]
    values = [value, v]
    if case.extra is not None and others is not None:
        mask = case.extra.key_mask
        seen = None if mask is None else mask[:, None, None, others]
        logits.append(scores(q, case.extra.k[:, others], seen))
        values.append(case.extra.v[:, others])
    return host.out(attend(torch.cat(logits, -1), torch.cat(values, 1)))


def atlasvid(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention with a pooled proxy."""
    options = plain(case.spec)
    cell = options["proxy"]["cell"]
    x, many, at = pooled(case, cell)
    k = case.host.split(case.host.raw(x, "k"), "k", at)
    v = case.host.split(case.host.raw(x, "v"), "v")
    weight = torch.log(many) if options["weight"] == "cells" else torch.zeros_like(many)
    weight = weight.masked_fill(many == 0, float("-inf"))
    cells = allowed(case, [Fraction(f) for f in cell], [math.ceil(n / f) for n, f in zip(case.grid, cell, strict=True)])
    everyone = None if case.extra is None else torch.arange(case.extra.k.shape[1])
    y = grid_rows(case, k, v, weight, cells, everyone)
    extra = extra_rows(case)
    return y if extra is None else (y, extra)


def with_segment(case: Case, first: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The same with the proxy as extra tokens from `first` on, on a grid of `counts` of its own: rows of grid and extras."""
    assert case.extra is not None
    extra, options, many = case.extra, plain(case.spec), counts[0] * counts[1] * counts[2]
    mine = torch.arange(first, first + many)
    others = torch.tensor([i for i in range(extra.k.shape[1]) if not first <= i < first + many], dtype=torch.long)
    share = math.log(len(grid_of(case.grid)) / many) if options["weight"] == "cells" else 0.0
    weight = torch.full((case.x.shape[0], many), share, dtype=torch.float64)
    if extra.key_mask is not None:
        weight = weight.masked_fill(~extra.key_mask[:, mine], float("-inf"))
    cells = allowed(case, [Fraction(n, c) for n, c in zip(case.grid, counts, strict=True)], counts)
    y = grid_rows(case, extra.k[:, mine], extra.v[:, mine], weight, cells, others)

    rows = extra_rows(case)
    assert rows is not None
    seen = None if extra.key_mask is None else extra.key_mask[:, None, None, mine]
    rows = rows.clone()
    rows[:, mine] = attend(scores(extra.q[:, mine], extra.k[:, mine], seen), extra.v[:, mine])
    return y, rows
