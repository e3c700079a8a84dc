"""Cells, lifts and resizes against loops, and the eager against the traced form."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ultrazoo.ops import pool
from ultrazoo.testing import error_ratio

GRIDS = [(1, 4, 6), (3, 5, 7), (4, 7, 9), (2, 8, 8)]
CELLS = [(1, 2, 2), (1, 3, 2), (2, 2, 2), (1, 4, 4), (3, 1, 2)]


def cell_loop(x: Tensor, cell: tuple[int, int, int], taps: Tensor, resize: bool) -> Tensor:
    """Weighted sum over each cell, token by token; taps (C, ft, fh, fw)."""
    grid = x.shape[1:4]
    counts = [n // f if resize else -(-n // f) for n, f in zip(grid, cell, strict=True)]
    out = x.new_zeros(x.shape[0], *counts, x.shape[-1])
    for place in itertools.product(*map(range, counts)):
        for tap in itertools.product(*map(range, cell)):
            at = [min(p * f + d, n - 1) for p, f, d, n in zip(place, cell, tap, grid, strict=True)]
            out[(slice(None), *place)] += x[(slice(None), *at)] * taps[(slice(None), *tap)]
    return out


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("ragged", ["exact", "resize"])
@pytest.mark.parametrize("traced", [False, True])
def test_cells_are_weighted_sums(cell: tuple[int, ...], grid: tuple[int, ...], ragged: str, traced: bool) -> None:
    if ragged == "resize" and any(n < f for n, f in zip(grid, cell, strict=True)):
        pytest.skip("nothing is left to resize")
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    kernel = cell if cell[0] > 1 else cell[1:]
    weight, bias = torch.randn(6, 1, *kernel, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = cell_loop(x, cell, weight.reshape(6, *cell), ragged == "resize") + bias
    found = pool.conv_cells(x, weight, bias, cell, ragged, traced)
    assert error_ratio(found, expected) < 1e-12
    mean = cell_loop(
        x, cell, torch.full((6, *cell), 1 / (cell[0] * cell[1] * cell[2]), dtype=x.dtype), ragged == "resize"
    )
    assert error_ratio(pool.mean_cells(x, cell, ragged, traced), mean) < 1e-12
    first = torch.zeros(6, *cell, dtype=x.dtype)
    first[:, 0, 0, 0] = 1
    picked = pool.first_of_cells(x, cell, ragged, traced)
    assert torch.equal(picked, cell_loop(x, cell, first, ragged == "resize"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_traced_lift_equals_interpolate_and_crop(cell: tuple[int, ...], grid: tuple[int, ...], mode: str) -> None:
    coarse = [-(-n // f) for n, f in zip(grid, cell, strict=True)]
    y = torch.randn(2, *coarse, 5, dtype=torch.float64)
    eager = pool.lift(y, cell, grid, mode)
    assert eager.shape == (2, *grid, 5)
    assert error_ratio(pool.lift(y, cell, grid, mode, traced=True), eager) < 1e-7
    whole = [n * f for n, f in zip(coarse, cell, strict=True)]
    scaled = F.interpolate(
        y.permute(0, 4, 1, 2, 3),
        size=whole,
        mode="nearest" if mode == "nearest" else "trilinear",
        align_corners=None if mode == "nearest" else False,
    ).permute(0, 2, 3, 4, 1)
    assert error_ratio(eager, scaled[:, : grid[0], : grid[1], : grid[2]]) < 1e-12


@pytest.mark.parametrize(
    ("length", "count", "nearest"), [(135, 4, 136), (10, 4, 8), (9, 4, 8), (11, 4, 12), (3, 4, 4), (8, 4, 8), (6, 4, 4)]
)
def test_nearest_multiple_rounds_ties_down(length: int, count: int, nearest: int) -> None:
    assert pool.nearest_multiple(length, count) == nearest


@pytest.mark.parametrize("grid", [(1, 3, 4), (2, 5, 3), (4, 6, 7), (2, 8, 3), (3, 17, 4), (1, 24, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_depthwise_conv3d_frame_by_frame_equals_conv3d(grid: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, *grid, 8), torch.randn(8, 1, 3, 3, 3), torch.randn(8)
    wide = F.conv3d(x.double().permute(0, 4, 1, 2, 3), weight.double(), bias.double(), padding=1, groups=8)
    args = [z.to(dtype) for z in (x, weight, bias)]
    with torch.no_grad():
        by_frames = pool.depthwise_conv3d(*args)
    with torch.enable_grad():
        at_once = pool.depthwise_conv3d(*args)
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    expected = wide.permute(0, 2, 3, 4, 1)
    assert error_ratio(by_frames, expected) < limit
    assert error_ratio(at_once, expected) < limit
