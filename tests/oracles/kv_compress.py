"""Compression of keys and values after projection, cell by cell (arXiv 2403.04692, section 3.3)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, scores

NORM_EPS = 1e-5
Cells = list[list[int]]


def cells_of(options: dict[str, Any], grid: tuple[int, int, int]) -> tuple[Cells, list[tuple[float, float, float]]]:
    """For every compressed key: the tokens it is made of (the edge token again where there is none), and its place."""
    factor = options["factor"]
    if options["mode"] == "uniform_every":
        places = grid_of(grid).tolist()
        kept = [n for n in range(len(places)) if n % factor == 0]
        return [[n] for n in kept], [tuple(places[n]) for n in kept]
    f = (1, factor, factor) if isinstance(factor, int) else (1, *factor) if len(factor) == 2 else tuple(factor)
    members, places = [], []
    for index in itertools.product(*(range(-(-size // k)) for size, k in zip(grid, f, strict=True))):
        axes = [[min(i * k + j, size - 1) for j in range(k)] for i, k, size in zip(index, f, grid, strict=True)]
        tokens = [(t * grid[1] + h) * grid[2] + w for t, h, w in itertools.product(*axes)]
        members.append(tokens[:1] if options["mode"] == "uniform" else tokens)
        rule = options["cell"] or ("first" if options["mode"] == "uniform" else "centre")
        shift = {"centre": 0.5, "first": 0.0, "index": 0.0}[rule]
        places.append(
            tuple(float(i) if rule == "index" else i * k + shift * (k - 1) for i, k in zip(index, f, strict=True))
        )
    return members, places


def small(case: Case, z: Tensor, members: Cells) -> Tensor:
    """(B, N, channels) → (B, keys, channels)."""
    options = plain(case.spec)
    real = torch.ones(z.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
    real_z = torch.where(real[..., None], z, torch.zeros_like(z))
    rows = []
    for tokens in members:
        cell, weight = real_z[:, tokens], real[:, tokens].to(z.dtype)[..., None]
        if options["mode"] == "conv" and len(tokens) > 1:
            taps = case.weights["sr.weight"].flatten(1).T
            row = (cell * taps[None]).sum(1) + case.weights["sr.bias"]
            row = row - row.mean(-1, keepdim=True)
            row = row / torch.sqrt(row.square().mean(-1, keepdim=True) + NORM_EPS)
            row = row * case.weights["norm.weight"] + case.weights["norm.bias"]
        else:
            # a cell of one token is that token
            row = cell.sum(1) / weight.sum(1).clamp(min=1)
        rows.append(row)
    return torch.stack(rows, dim=1)


def kv_compress(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Queries of every token, keys and values of every cell."""
    members, places = cells_of(plain(case.spec), case.grid)
    q = case.host.split(case.host.raw(case.x, "q"), "q", grid_of(case.grid))
    k = case.host.split(case.host.raw(case.x, "k"), "k")
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    heads, size = k.shape[2:]
    k, v = (small(case, z.flatten(2), members).unflatten(-1, (heads, size)) for z in (k, v))
    k = case.host.rotate(k, torch.tensor(places, dtype=torch.float64))
    real = torch.ones(k.shape[0], len(members), dtype=torch.bool)
    if case.key_valid is not None:
        real = torch.stack([case.key_valid[:, tokens].any(1) for tokens in members], dim=1)
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], 1), torch.cat([v, case.extra.v], 1)
        mask = case.extra.key_mask
        more = torch.ones(k.shape[0], case.extra.k.shape[1], dtype=torch.bool) if mask is None else mask
        real = torch.cat([real, more], 1)
    y = case.host.out(attend(scores(q, k, real[:, None, None]), v))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
