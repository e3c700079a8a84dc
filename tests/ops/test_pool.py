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
    with torch.no_grad():
        assert error_ratio(pool.lift(y, cell, grid, mode), eager) < 1e-12
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


CONVOLVED = [(1, 3, 4), (2, 5, 3), (4, 6, 7), (2, 8, 3), (3, 17, 4), (1, 24, 2), (7, 4, 4)]
CONV_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def conv3d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Every tap by itself, in fp64: the frames, rows and columns beyond an edge are zero."""
    full = F.pad(x.double(), (0, 0, 1, 1, 1, 1, 1, 1))
    found = bias.double().expand(*x.shape).clone()
    for t, h, w in itertools.product(range(3), repeat=3):
        moved = full[:, t : t + x.shape[1], h : h + x.shape[2], w : w + x.shape[3]]
        found += moved * weight[:, 0, t, h, w].double()
    return found


@pytest.mark.parametrize("grid", CONVOLVED, ids=str)
@pytest.mark.parametrize("dtype", list(CONV_LIMITS), ids=str)
def test_depthwise_conv3d_is_the_sum_of_its_taps(grid: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (z.to(dtype) for z in (torch.randn(2, *grid, 8), torch.randn(8, 1, 3, 3, 3), torch.randn(8)))
    expected = conv3d(x, weight, bias)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert error_ratio(pool.depthwise_conv3d(x, weight, bias), expected) < CONV_LIMITS[dtype]
            # not as it lies in memory
            turned = x.transpose(2, 3).contiguous().transpose(2, 3)
            assert error_ratio(pool.depthwise_conv3d(turned, weight, bias), expected) < CONV_LIMITS[dtype]
    frames = pool._frame_by_frame(x.shape, lambda b, t: x[b, t : t + 1], weight, bias)
    by_frames = pool._together(frames, x.shape, x)
    assert error_ratio(by_frames, expected) < CONV_LIMITS[dtype]


@pytest.mark.parametrize("grid", CONVOLVED, ids=str)
@pytest.mark.parametrize("ragged", ["exact", "resize"])
@pytest.mark.parametrize("dtype", list(CONV_LIMITS), ids=str)
def test_a_lift_is_convolved_frame_by_frame_as_at_once(
    grid: tuple[int, ...], ragged: pool.Ragged, dtype: torch.dtype
) -> None:
    cell = (1, 2, 3)
    coarse = [max(1, pool.coarse_size(n, f, ragged)) for n, f in zip(grid, cell, strict=True)]
    x, weight, bias = (z.to(dtype) for z in (torch.randn(2, *coarse, 8), torch.randn(8, 1, 3, 3, 3), torch.randn(8)))
    with torch.no_grad():
        found = pool.lift_conv3d(x, cell, grid, weight, bias, ragged)
        expected = conv3d(pool.lift(x, cell, grid, "bilinear", ragged), weight, bias)
    assert found.shape == (2, *grid, 8)
    assert found.dtype == dtype
    assert error_ratio(found, expected) < CONV_LIMITS[dtype]
    with torch.enable_grad():
        assert error_ratio(pool.lift_conv3d(x, cell, grid, weight, bias, ragged), expected) < CONV_LIMITS[dtype]
