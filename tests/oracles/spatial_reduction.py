"""Keys and values of a reduced map, place by place (arXiv 2106.13797 section 3.2, arXiv 2104.13840 equation 3)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, extra_rows, grid_of, plain, scores

NORM_EPS = 1e-5


def axis_cells(options: dict[str, Any], axis: int, length: int) -> list[list[int]]:
    """Tokens along one axis of every cell, the edge token again where a cell is partial."""
    if options["mode"] == "pool":
        if axis == 0:
            return [[i] for i in range(length)]
        size = options["size"]
        count = size if isinstance(size, int) else size[axis - 1]
        return [list(range(i * length // count, math.ceil((i + 1) * length / count))) for i in range(count)]
    factor = options["factor"]
    f = ((1, factor, factor) if isinstance(factor, int) else (1, *factor) if len(factor) == 2 else factor)[axis]
    return [[min(i + j, length - 1) for j in range(f)] for i in range(0, length, f)]


def axis_places(options: dict[str, Any], axis: int, length: int) -> list[float]:
    """Where keys are along one axis: at the middle of their cell, a partial one counted as whole, or at their index."""
    cells = axis_cells(options, axis, length)
    if options["cell"] == "index":
        return [float(i) for i in range(len(cells))]
    if options["mode"] == "pool":
        return [sum(cell) / len(cell) for cell in cells]
    return [cell[0] + (len(cell) - 1) / 2 for cell in cells]


def reduced(case: Case, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced map (B, keys, C), which of it is real (B, keys), and its places (keys, 3)."""
    x = case.x
    real = torch.ones(x.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
    x = torch.where(real[..., None], x, torch.zeros_like(x))
    weight, bias = case.weights["sr.weight"].flatten(2), case.weights["sr.bias"]
    rows, kept = [], []
    for axes in itertools.product(*(axis_cells(options, a, case.grid[a]) for a in range(3))):
        tokens = [(t * case.grid[1] + h) * case.grid[2] + w for t, h, w in itertools.product(*axes)]
        cell, of = x[:, tokens], real[:, tokens]
        if options["mode"] == "pool":
            cell = (cell.sum(1) / of.sum(1).clamp(min=1)[:, None].to(x.dtype))[:, None]
        row = bias + sum(cell[:, i] @ weight[:, :, i].T for i in range(cell.shape[1]))
        row = row - row.mean(-1, keepdim=True)
        row = row / torch.sqrt(row.square().mean(-1, keepdim=True) + NORM_EPS)
        row = row * case.weights["norm.weight"] + case.weights["norm.bias"]
        if options["mode"] == "pool":
            row = row * 0.5 * (1 + torch.erf(row / math.sqrt(2)))
        rows.append(row)
        kept.append(of.any(1))
    places = list(itertools.product(*(axis_places(options, a, case.grid[a]) for a in range(3))))
    return torch.stack(rows, 1), torch.stack(kept, 1), torch.tensor(places, dtype=torch.float64)


def spatial_reduction(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Queries of every token, keys and values of every place of the reduced map."""
    options = plain(case.spec)
    if "sr.weight" in case.weights:
        z, real, places = reduced(case, options)
    else:
        assert options["factor"] == 1
        z, places = case.x, grid_of(case.grid)
        real = torch.ones(z.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
    q = case.host.split(case.host.raw(case.x, "q"), "q", grid_of(case.grid))
    k = case.host.split(case.host.raw(z, "k"), "k", places)
    v = case.host.split(case.host.raw(z, "v"), "v")
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], 1), torch.cat([v, case.extra.v], 1)
        mask = case.extra.key_mask
        more = torch.ones(k.shape[0], case.extra.k.shape[1], dtype=torch.bool) if mask is None else mask
        real = torch.cat([real, more], 1)
    y = case.host.out(attend(scores(q, k, real[:, None, None]), v))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
