"""Windows beside a proxy: against the oracle with segments, means as a segment, where cells stand, weights, costs, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention.calls import same_weights
from tests.attention.raw import GivenHost
from tests.oracles import atlasvid as oracle
from ultrazoo.attention.atlasvid import AtlasvidSpec, PooledSpec, SegmentSpec, proxy_positions
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.contract import Call, Extra
from ultrazoo.attention.parts.layouts import WindowsSpec
from ultrazoo.errors import SiteError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.ops.pool import true_means
from ultrazoo.options import parse_part
from ultrazoo.recipe import make_plan, resolve
from ultrazoo.recipe.load import load
from ultrazoo.spec import AttentionSpec, Rope, Segment, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=16, heads=2, head_dim=8, grid=Grid(4, 6, 8), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
BESIDE = SegmentSpec()


def proxy(*grid: int) -> Segment:
    return Segment("proxy", math.prod(grid), Grid(*grid), rows="pattern", keys="compete")


def scenario(spec: AttentionSpec, site: Site = SITE, **options: Any) -> Scenario:
    return Scenario(Example(spec, site, "atlasvid"), torch.float64, **options)


@pytest.mark.parametrize("weight", ["none", "cells"])
@pytest.mark.parametrize("margin", [0, 1, "full"])
@pytest.mark.parametrize("place", ["alone", "first", "last", "between"])
def test_a_proxy_segment_equals_the_oracle(place: str, margin: Any, weight: Any) -> None:
    """Cells that divide nothing: 2 x 3 x 5 beside 3 x 5 x 7, with and without text around them, some tokens invalid."""
    cells = (2, 3, 5)
    text = {"alone": (), "first": (3,), "last": (3,), "between": (2, 1)}[place]
    segments = [Segment("text", length) for length in text]
    before = {"alone": 0, "first": 0, "last": 1, "between": 1}[place]
    segments.insert(before, proxy(*cells))
    site = SITE.at(grid=Grid(3, 5, 7), extra=tuple(segments))
    spec = AtlasvidSpec(window=(2, 3, 4), proxy=BESIDE, margin=margin, weight=weight)
    one = scenario(spec, site, extra=True, key_valid=True)
    first = sum(segment.length for segment in segments[:before])
    with torch.no_grad():
        y, rows = one.run()
        expected, expected_rows = oracle.with_segment(one.case(), first, list(cells))
    assert_close("grid rows", y, expected, EXACT)
    assert one.extra is not None
    assert one.extra.key_mask is not None
    real = one.extra.key_mask
    assert_close("extra rows", rows[real], expected_rows[real], EXACT)


@pytest.mark.parametrize(
    ("grid", "spec"),
    [
        # cells and windows longer than an axis, the training grid beyond it, an image, one token
        ((3, 5, 7), AtlasvidSpec(window=(9, 9, 9), proxy=PooledSpec(cell=(9, 2, 9)))),
        ((1, 5, 7), AtlasvidSpec(window=(4, 2, 3), proxy=PooledSpec(cell=(2, 2, 2)), weight="cells")),
        ((2, 3, 5), AtlasvidSpec(window=(1, 2, 2), proxy=PooledSpec(cell=(1, 1, 1)), margin=0)),
        ((1, 1, 1), AtlasvidSpec(window=(2, 2, 2), proxy=PooledSpec(cell=(2, 4, 4)))),
        ((2, 1, 9), AtlasvidSpec(window=(2, 2, 4), proxy=PooledSpec(cell=(2, 1, 4)), margin=2, weight="cells")),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_means_at_sizes_that_fit_nothing(grid: tuple[int, int, int], spec: AtlasvidSpec) -> None:
    for more in ({}, {"key_valid": True}):
        one = scenario(spec, SITE.at(grid=Grid(*grid)), **more)
        real = torch.ones(one.x.shape[:2], dtype=torch.bool) if one.key_valid is None else one.key_valid
        with torch.no_grad():
            got, expected = one.run(), oracle.atlasvid(one.case())
        assert isinstance(expected, Tensor)
        assert_close(f"{grid} {more}", got[real], expected[real], EXACT)


def means_as_a_segment(one: Scenario, cell: tuple[int, int, int], coarse: tuple[int, int, int]) -> Extra:
    """The proxy that the means of raw keys and values are, rotated by its owner at `proxy_positions`."""
    host: Any = one.runner.host
    _, raw_k, raw_v = host.project(one.x, "qkv")
    k, v = (true_means(z.unflatten(1, tuple(one.grid)), cell)[0].flatten(1, 3) for z in (raw_k, raw_v))
    _, k, v = host.heads(None, k, v, proxy_positions(one.grid, coarse))
    return Extra(torch.randn_like(k), k, v, None, (proxy(*coarse),))


@pytest.mark.parametrize("weight", ["none", "cells"])
def test_means_equal_a_segment_of_them_put_in_place_by_its_owner(weight: Any) -> None:
    """A rotated segment, aligned by `proxy_positions`, where cells divide the grid: one output, two ways."""
    pooled = AtlasvidSpec(window=(2, 3, 4), proxy=PooledSpec(cell=(2, 3, 2)), weight=weight)
    one = scenario(pooled)
    beside = replace(pooled, proxy=BESIDE)
    with torch.no_grad():
        extra = means_as_a_segment(one, (2, 3, 2), (2, 2, 4))
        site = SITE.at(extra=extra.segments)
        two = scenario(beside, site)
        two.runner.host = one.runner.host
        got, _ = two.run(one.x, extra=extra)
        assert_close("segment", got, one.run(), EXACT)
        turned = replace(extra, k=extra.k.flip(1))
        assert error_ratio(two.run(one.x, extra=turned)[0], one.run()) > 0.05


def test_without_a_real_proxy_token_windows_are_alone() -> None:
    """Reordered windows are plain ones: as few as keep to the extent, as equal as can be."""
    site = SITE.at(grid=Grid(5, 6, 7), extra=(proxy(2, 2, 2),))
    one = scenario(AtlasvidSpec(window=(3, 4, 3), proxy=BESIDE), site, extra=True)
    assert one.extra is not None
    nothing = replace(one.extra, key_mask=torch.zeros(2, 8, dtype=torch.bool))
    windows = BranchedSpec(branches={"windows": BranchSpec(layout=WindowsSpec(counts=(2, 2, 3)))})
    with torch.no_grad():
        y, _ = one.run(extra=nothing)
        alone = scenario(windows, site.at(extra=()))
        alone.runner.host = one.runner.host
        assert_close("windows", y, alone.run(one.x), EXACT)
        assert error_ratio(one.run()[0], y) > 0.05


def test_guidance_is_one_way() -> None:
    """Queries of the grid see the proxy, queries of the proxy see nothing of the grid."""
    site = SITE.at(extra=(proxy(2, 2, 2),))
    one = scenario(AtlasvidSpec(window=(2, 3, 4), proxy=BESIDE, margin="full"), site, extra=True)
    assert one.extra is not None
    with torch.no_grad():
        y, rows = one.run()
        y_moved, rows_moved = one.run(one.x + 1)
        assert torch.equal(rows, rows_moved)
        assert error_ratio(y_moved, y) > 0.1
        values = one.extra.v.clone()
        values[:, 0] += 1
        y_guided, rows_guided = one.run(extra=one.masked_extra(v=values))
    assert bool(((y_guided - y).abs().amax(-1) > 0).all())
    assert bool(((rows_guided - rows)[1].abs().amax((-1)) > 0).all())


def test_a_cell_weighs_as_much_as_its_tokens() -> None:
    """Tokens that are equal inside each cell: weight: cells is full attention in which the own window counts twice."""
    grid, cell, heads = (2, 4, 6), (2, 2, 3), 2
    torch.manual_seed(0)
    cells = [torch.randn(1, 1, 2, 2, heads * 8, dtype=torch.float64) for _ in range(3)]
    q, k, v = (z.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(3, 3).flatten(1, 3) for z in cells)
    site = Site(dim=16, heads=heads, head_dim=8, grid=Grid(*grid))

    def run(weight: Any) -> Tensor:
        spec = AtlasvidSpec(window=(1, 1, 1), proxy=PooledSpec(cell=cell), margin="full", weight=weight)
        y: Tensor = spec.build(site).double()(torch.cat([q, k, v], -1), GivenHost(heads), Call(grid=grid))
        return y.unflatten(-1, (heads, 8))

    split = [z.unflatten(-1, (heads, 8)) for z in (q, k, v)]
    scores = torch.einsum("bnhd,bmhd->bhnm", split[0], split[1]) / 8**0.5
    twice = scores + math.log(2) * torch.eye(48, dtype=torch.float64)
    expected = torch.einsum("bhnm,bmhd->bnhd", twice.softmax(-1), split[2])
    assert_close("cells", run("cells"), expected, EXACT)
    assert error_ratio(run("none"), expected) > 0.05


def test_a_cell_of_invalid_tokens_takes_no_part() -> None:
    """Means are of what is real: numbers in invalid tokens change nothing, and a cell without a real one is no key."""
    one = scenario(AtlasvidSpec(window=(2, 2, 2), proxy=PooledSpec(cell=(2, 3, 4)), margin="full", weight="cells"))
    valid = torch.ones(2, *SITE.grid, dtype=torch.bool)
    valid[0, :2, :3, :4] = False
    valid[1, 2, 4, 5] = False
    flat = valid.flatten(1)
    x = one.x.masked_fill(~flat[..., None], 1e3)
    with torch.no_grad():
        first, second = one.run(key_valid=flat), one.run(x, key_valid=flat)
        assert_close("invalid tokens", second[flat], first[flat], EXACT)
        assert error_ratio(one.run()[flat], first[flat]) > 1e-3


def test_cells_stand_in_the_middle_of_what_they_cover() -> None:
    at = proxy_positions((21, 136, 240), (21, 34, 60))
    assert at.t.tolist() == list(range(21))
    assert at.h[:3].tolist() == [1.5, 5.5, 9.5]
    assert at.w[-1].item() == 237.5
    # 2 cells over 3 tokens: each a token and a half
    assert proxy_positions((3, 1, 5), (2, 1, 5)).t.tolist() == [0.25, 1.75]
    assert (at.rule, at.extent) == ("none", None)


def test_a_partial_cell_stands_in_the_middle_of_the_tokens_it_has() -> None:
    spec = AtlasvidSpec(window=(1, 1, 1), proxy=PooledSpec(cell=(2, 3, 4)))
    grid = Grid(5, 7, 9)
    coarse, span = spec.coarse(grid, ()), spec.span(grid)
    assert (tuple(coarse), tuple(span)) == ((3, 3, 3), (6, 9, 12))
    at = proxy_positions(grid, coarse, span)
    for places, length, size in zip(at[:3], grid, (2, 3, 4), strict=True):
        wanted = [np.mean(range(first, min(first + size, length))) for first in range(0, length, size)]
        assert places.tolist() == wanted


def test_a_proxy_of_the_grids_own_size_stands_on_its_tokens() -> None:
    at = proxy_positions((2, 3, 4), (2, 3, 4))
    assert [axis.tolist() for axis in at[:3]] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("margin", [0, 1, "full"])
def test_the_cost_is_windows_and_cells_and_the_proxys_own_square(margin: Any) -> None:
    """N (w + p) + P^2 pairs: every window (2, 4, 5) on (4, 8, 10), every cell 2 x 2 x 5."""
    near = {0: 1 * 2 * 1, 1: 2 * 3 * 2, "full": 2 * 4 * 2}[margin]
    site = SITE.at(grid=Grid(4, 8, 10))
    spec = AtlasvidSpec(window=(2, 4, 5), proxy=PooledSpec(cell=(2, 2, 5)), margin=margin)
    tokens = 4 * 8 * 10
    pairs = tokens * (2 * 4 * 5 + near)
    assert spec.cost(site).pairs == pairs
    assert spec.cost(site).attention_flops == 4 * pairs * 16
    beside = replace(spec, proxy=BESIDE)
    assert beside.cost(site.at(extra=(proxy(2, 4, 2),))).pairs == pairs + 16**2


def test_at_4k_windows_are_the_training_grid_or_smaller() -> None:
    plan = make_plan(resolve(load("atlasvid_wan_14b_4k")))
    tokens = 21 * 136 * 240
    # four windows of 34 rows, three of 80 columns; 11 layers of cells, of two frames each
    rows = 34 * (10 + 11 + 11 + 10)
    columns = 80 * (21 + 22 + 21)
    assert plan.layers[0].pairs == tokens * 21 * 34 * 80 + 21 * 11 * rows * columns


def test_the_window_is_the_trained_grid_unless_given() -> None:
    trained = SITE.at(rope=Rope(axes=(4, 2, 2), trained=Grid(2, 3, 4)))
    one = scenario(AtlasvidSpec(), trained)
    with torch.no_grad():
        assert_close("trained", same_weights(AtlasvidSpec(window=(2, 3, 4)), one), one.run(), EXACT)
    for site in (SITE, SITE.at(rope=None)):
        found = AtlasvidSpec().problems(site)
        assert [(problem.path, problem.fix) for problem in found] == [
            ("window", "give the largest window: [T, H, W] in tokens")
        ]
        with pytest.raises(SiteError, match="at which grid it was trained"):
            AtlasvidSpec().build(site)


@pytest.mark.parametrize(
    ("segments", "rule", "fix"),
    [
        ((), "needs one segment 'proxy' with a grid", "or use proxy: pooled"),
        ((Segment("text", 8),), "needs one segment 'proxy'", "or use proxy: pooled"),
        ((replace(proxy(2, 2, 2), grid=None),), "needs one segment 'proxy' with a grid", "or use proxy: pooled"),
        ((replace(proxy(2, 2, 2), length=9),), "a grid of its length", "or use proxy: pooled"),
        ((replace(proxy(2, 2, 2), rows="dense"),), "rows=pattern", "or use proxy: pooled"),
        ((replace(proxy(2, 2, 2), keys="always"),), "keys=compete", "or use proxy: pooled"),
        ((proxy(2, 2, 2), proxy(1, 2, 2)), "needs one segment", "or use proxy: pooled"),
        ((proxy(5, 2, 2),), "the segment has 5 cells along t, the grid 4 tokens", "a proxy has 1 to 4 there"),
    ],
    ids=str,
)
def test_segments_that_are_no_proxy_are_refused(segments: tuple[Segment, ...], rule: str, fix: str) -> None:
    spec, site = AtlasvidSpec(window=(2, 3, 4), proxy=BESIDE), SITE.at(extra=segments)
    found = spec.problems(site)
    assert [problem.path for problem in found] == ["proxy"]
    assert rule in found[0].rule
    assert fix == found[0].fix
    with pytest.raises(SiteError):
        spec.build(site)


def test_a_call_without_its_proxy_is_refused() -> None:
    one = scenario(AtlasvidSpec(window=(2, 3, 4), proxy=BESIDE), SITE.at(extra=(proxy(2, 2, 2),)), extra=True)
    assert one.extra is not None
    with pytest.raises(UsageError, match="needs one segment 'proxy'"):
        one.run(extra=None)
    text = replace(one.extra, segments=(Segment("text", 8),))
    with pytest.raises(UsageError, match="needs one segment 'proxy'"):
        one.run(extra=text)
    with pytest.raises(UsageError, match="rows=pattern, keys=compete: use block_sparse"):
        same_weights(AtlasvidSpec(window=(2, 3, 4)), one)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"window": [2, 3]}, "window"),
        ({"window": [0, 3, 3]}, "window"),
        ({"margin": -1}, "margin"),
        ({"margin": "all"}, "margin"),
        ({"weight": "log"}, "weight"),
        ({"proxy": "mean"}, "proxy"),
        ({"proxy": {"name": "pooled", "cell": [2, 0, 4]}}, "proxy.cell"),
        ({"proxy": {"name": "pooled", "cell": [4, 4]}}, "proxy.cell"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], path: str) -> None:
    spec, problems = parse_part("attention", {"name": "atlasvid", **options})
    assert spec is None
    assert [problem.path for problem in problems] == [path]
