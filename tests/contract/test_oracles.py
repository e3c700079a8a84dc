"""The oracles check each other and torch, so that an error in one is not taken for the truth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.oracles import cells, gates, samples, windows
from tests.oracles.branched import branched_heads
from tests.oracles.ultragen import block
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import Case, ExtraTokens, ReferenceHost, assert_close, dense_heads, error_ratio, null_answers

DIM, HEADS, HEAD_DIM = 10, 2, 8
WIDTH = HEADS * HEAD_DIM
EXACT = 1e-11


def case_of(options: dict[str, Any], grid: tuple[int, int, int], *, layer: int = 0, extra: bool = False) -> Case:
    """A random call of a branched attention with these options."""
    g = torch.Generator().manual_seed(sum(grid) + layer)
    rope = Rope(axes=(4, 2, 2))
    host = ReferenceHost(samples.host_weights(g, DIM, WIDTH), HEADS, HEAD_DIM, rope)
    many = samples.sizes_of(grid)
    tokens = None
    if extra:
        q, k, v = (samples.randn(g, 2, 3, HEADS, HEAD_DIM) for _ in range(3))
        tokens = ExtraTokens(q, k, v, torch.tensor([[True, True, False], [True, True, True]]))
    return Case(
        spec=SimpleNamespace(**options),  # type: ignore[arg-type]
        site=Site(dim=DIM, heads=HEADS, head_dim=HEAD_DIM, layer=layer, layers=30, grid=Grid(*grid), rope=rope),
        x=samples.randn(g, 2, many, DIM, scale=3.0),
        grid=grid,
        host=host,
        weights=samples.own_weights(g, options, DIM, WIDTH, gates=2),
        timestep=torch.tensor([731.0, 20.5], dtype=torch.float64),
        extra=tokens,
    )


@pytest.mark.parametrize("extra", [False, True], ids=["grid", "extra"])
@pytest.mark.parametrize("layer", [4, 5])
@pytest.mark.parametrize("grid", [(2, 8, 12), (3, 11, 13), (1, 9, 10)], ids=str)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_ultragen_window_by_window_equals_dense_masks(
    variant: str, grid: tuple[int, int, int], layer: int, extra: bool
) -> None:
    options = samples.ultragen_options(variant)
    case = case_of(options, grid, layer=layer, extra=extra)
    expected = block(case, released=variant == "released")
    got = branched_heads(case, options)
    assert_close("branches against windows", got, expected, EXACT)
    for name, wrong in null_answers(expected).items():
        assert error_ratio(wrong, expected) > 1e3 * EXACT, name


def test_the_variants_differ() -> None:
    case = case_of(samples.ultragen_options("paper"), (2, 9, 13))
    assert error_ratio(block(case, True), block(case, False)) > 0.05


@pytest.mark.parametrize("factor", [2, [3, 2], [2, 2, 3]], ids=str)
@pytest.mark.parametrize("grid", [(4, 6, 6), (5, 7, 8)], ids=str)
def test_cells_equal_torch_on_padded_maps(factor: Any, grid: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    z = samples.randn(g, 2, *grid, 3)
    f = cells.factors(factor)
    pad = [-n % k for n, k in zip(grid, f, strict=True)]
    padded = F.pad(z.permute(0, 4, 1, 2, 3), (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
    options = {"name": "avg_pool", "factor": factor, "ragged": "exact", "lift": "bilinear"}
    pooled = cells.compress(z, options, {})
    assert_close("pool", pooled.permute(0, 4, 1, 2, 3), F.avg_pool3d(padded, f), EXACT)

    kernel, bias = samples.randn(g, 3, 1, *f), samples.randn(g, 3)
    conv = cells.compress(z, options | {"name": "depthwise_conv"}, {"conv.weight": kernel, "conv.bias": bias})
    assert_close("conv", conv.permute(0, 4, 1, 2, 3), F.conv3d(padded, kernel, bias, stride=f, groups=3), EXACT)

    first = cells.compress(z, options | {"name": "stride"}, {})
    assert torch.equal(first, z[:, :: f[0], :: f[1], :: f[2]])

    up = F.interpolate(pooled.permute(0, 4, 1, 2, 3), scale_factor=f, mode="trilinear", align_corners=False)
    up = up[:, :, : grid[0], : grid[1], : grid[2]].permute(0, 2, 3, 4, 1)
    assert_close("lift", cells.lift(pooled, grid, options, {}), up, EXACT)
    nearest = cells.lift(pooled, grid, options | {"lift": "nearest"}, {})
    again = pooled.repeat_interleave(f[0], 1).repeat_interleave(f[1], 2).repeat_interleave(f[2], 3)
    assert torch.equal(nearest, again[:, : grid[0], : grid[1], : grid[2]])

    taps, offset = samples.randn(g, 3, 1, 3, 3, 3), samples.randn(g, 3)
    refined = cells.convolve(z, taps, offset).permute(0, 4, 1, 2, 3)
    assert_close("3x3x3", refined, F.conv3d(z.permute(0, 4, 1, 2, 3), taps, offset, padding=1, groups=3), EXACT)


def test_resize_equals_torch() -> None:
    z = samples.randn(torch.Generator().manual_seed(2), 1, 2, 7, 9, 3)
    expected = F.interpolate(z[0].permute(0, 3, 1, 2), size=(8, 6), mode="bilinear", align_corners=False)
    assert_close("resize", cells.resize(z, (2, 8, 6))[0].permute(0, 3, 1, 2), expected, EXACT)


@pytest.mark.parametrize(
    ("size", "layout", "shift", "layer", "expected"),
    [
        (11, {"counts": [4, 4]}, "none", 0, [3, 3, 3, 2]),
        (11, {"counts": [4, 4]}, "repartition", 1, [3, 2, 2, 2, 2]),
        (11, {"counts": [1, 4]}, "repartition", 1, [6, 5]),
        (11, {"counts": [1, 4]}, "repartition", 0, [11]),
        (11, {"size": 4}, "none", 0, [4, 4, 3]),
        (11, {"size": 4}, "roll", 1, [2, 4, 4, 1]),
        (11, {"size": 4}, "roll", 2, [4, 4, 3]),
        (4, {"size": 5}, "roll", 1, [4]),
        (3, {"size": 1}, "roll", 1, [1, 1, 1]),
        (11, {"counts": 3}, "roll", 1, [2, 4, 3, 2]),
        (11, {"counts": 3}, "roll", 0, [4, 4, 3]),
    ],
    ids=str,
)
def test_window_lengths(size: int, layout: dict[str, Any], shift: str, layer: int, expected: list[int]) -> None:
    got = windows.window_lengths(size, 1, {"name": "windows"} | layout, {"name": shift}, layer)
    assert got == expected


def test_time_stays_whole_unless_it_is_split() -> None:
    layout = {"name": "windows", "size": [2, 3]}
    assert windows.axis_labels(5, 0, layout, {"name": "none"}, 0) == [0] * 5
    assert windows.axis_labels(5, 0, layout | {"size": [2, 2, 3]}, {"name": "none"}, 0) == [0, 0, 1, 1, 2]


def test_strided_groups_are_residue_classes() -> None:
    layout = {"name": "strided", "counts": [1, 3, 2]}
    assert windows.axis_labels(7, 1, layout, {"name": "none"}, 0) == [0, 1, 2, 0, 1, 2, 0]


def test_positions() -> None:
    labels = [[0], [0, 0, 1, 1, 1], [0]]
    at = windows.token_positions(labels, (1, 2, 4), "window", "centre")
    assert at[:, 1].tolist() == [0.0, 2.0, 0.0, 2.0, 4.0]
    assert at[:, 2].tolist() == [0.0] * 5
    at = windows.token_positions(labels, (1, 2, 4), "grid", "centre")
    assert at[:, 1].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert at[:, 2].tolist() == [1.5] * 5
    assert windows.token_positions(labels, (1, 2, 4), "grid", "index")[:, 1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("size", "unit", "expected"), [(10, 4, 8), (11, 4, 12), (7, 2, 6), (3, 4, 4), (9, 3, 9)])
def test_nearest_multiple_ties_down(size: int, unit: int, expected: int) -> None:
    assert windows.nearest_multiple(size, unit) == expected


def test_one_window_as_large_as_the_grid_is_full_attention() -> None:
    fuse = {"name": "weights", "weights": None, "learned": False}
    whole = {"branches": {"a": samples.branch(layout={"name": "windows", "counts": 1})}, "fuse": fuse}
    case = case_of(whole, (2, 3, 5), extra=True)
    assert_close("whole", branched_heads(case, whole), dense_heads(case), EXACT)


def test_joint_softmax_of_disjoint_branches_is_full_attention() -> None:
    """Even and odd key columns seen by two branches, joined, are every key."""
    fuse = {"name": "lse"}
    options = {"branches": {"a": samples.branch(layout={"name": "whole"})}, "fuse": fuse}
    case = case_of(options, (2, 3, 4))
    assert_close("one branch", branched_heads(case, options), dense_heads(case), EXACT)
    doubled = {"branches": {"a": samples.branch(), "b": samples.branch()}, "fuse": fuse}
    assert_close("every key twice", branched_heads(case, doubled), dense_heads(case), EXACT)


def test_rotation_depends_on_differences_alone() -> None:
    """Scores of rotated queries and keys do not change when all positions move, for either pairing."""
    g = torch.Generator().manual_seed(3)
    q, k = samples.randn(g, 1, 4, 1, 8), samples.randn(g, 1, 4, 1, 8)
    at = samples.randn(g, 4, 3, scale=5.0)
    for pairing in ("interleaved", "halves"):
        host = ReferenceHost({}, 1, 8, Rope(axes=(4, 2, 2), pairing=pairing))  # type: ignore[arg-type]
        dots = [(host.rotate(q, at + s)[0, :, 0] @ host.rotate(k, at + s)[0, :, 0].T) for s in (0.0, 7.5)]
        assert_close(pairing, dots[1], dots[0], 1e-9)
        assert error_ratio(host.rotate(q, at), q) > 0.1


def test_rotation_as_complex_numbers() -> None:
    g = torch.Generator().manual_seed(4)
    z, at = samples.randn(g, 2, 6, 3, 10), samples.randn(g, 6, 3, scale=9.0)
    host = ReferenceHost({}, 3, 10, Rope(axes=(4, 2, 2), base=100.0))
    angle = torch.cat(
        [at[:, :1] * torch.tensor([1.0, 0.1], dtype=torch.float64), at[:, 1:2], at[:, 2:]], dim=1
    ).double()
    turned = torch.view_as_complex(z[..., :8].unflatten(-1, (4, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    expected = torch.cat([torch.view_as_real(turned).flatten(-2), z[..., 8:]], dim=-1)
    assert_close("complex", host.rotate(z, at), expected, EXACT)


def test_sinusoid() -> None:
    wave = gates.sinusoid(torch.tensor([0.0, 1000.0]))
    assert wave[0].tolist() == [1.0] * 128 + [0.0] * 128
    expected = torch.cos(torch.tensor(1000.0 * 10000 ** (-5 / 128), dtype=torch.float64))
    assert_close("channel 5", wave[1, 5], expected, EXACT)
