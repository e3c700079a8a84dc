"""FreeSwim's window: the published mask, scale and share of pairs, axes shorter than the window, images, wrong options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.attention.calls import same_weights
from ultrazoo.attention.freeswim import FreeswimSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.neighborhood import NeighborhoodSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.recipe import make_plan, resolve
from ultrazoo.recipe.load import load
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=16, heads=2, head_dim=8, grid=Grid(2, 7, 9), rope=Rope(axes=(4, 2, 2)), qk_norm=True)


def scenario(spec: AttentionSpec, site: Site = SITE) -> Scenario:
    return Scenario(Example(spec, site, "freeswim"), torch.float64)


def published(length: int, d: int) -> np.ndarray:
    """(L, L) as the source writes it: d on either side, and on one side what the other lacks at its border."""
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    seen: np.ndarray = (k <= q + d + np.maximum(d - q, 0)) & (k >= q - d - np.maximum(d + q - length + 1, 0))
    return seen


@pytest.mark.parametrize("trained", [(2, 4), (3, 5), (6, 8), (4, 2)], ids=str)
def test_the_mask_is_the_published_one(trained: tuple[int, int]) -> None:
    h, w = (published(length, size // 2) for length, size in zip((7, 9), trained, strict=True))
    expected = np.kron(np.ones((2, 2), dtype=bool), np.kron(h, w))
    seen = FreeswimSpec(trained=trained).expand(SITE).visible(SITE)[0]
    assert (seen == expected).all()
    size = (2 * (trained[0] // 2) + 1) * (2 * (trained[1] // 2) + 1)
    assert (seen.sum(1) == 2 * size).all()


def test_it_is_a_neighbourhood_over_all_frames_with_scaled_scores() -> None:
    spec = FreeswimSpec(trained=(4, 5))
    scale = math.sqrt(math.log(40, 20) / 8)
    one = scenario(spec)
    with torch.no_grad():
        expected = one.run()
        got = same_weights(NeighborhoodSpec(kernel_size=(2, 5, 5), scale=scale), one)
        assert_close("neighbourhood", got, expected, EXACT)
        plain = same_weights(NeighborhoodSpec(kernel_size=(2, 5, 5)), one)
        assert error_ratio(plain, expected) > 1e-3
        assert_close("scaled: false", same_weights(FreeswimSpec(trained=(4, 5), scaled=False), one), plain, EXACT)


def test_published_window_scale_and_share() -> None:
    """Wan2.1-T2V-1.3B at 1088p, trained at 30 x 52 tokens."""
    site = Site(dim=1536, heads=12, head_dim=128, grid=Grid(21, 68, 120))
    spec = FreeswimSpec()
    assert spec.window == (31, 53)
    inner = spec.expand(site)
    assert isinstance(inner, NeighborhoodSpec)
    assert inner.scale == pytest.approx(math.sqrt(math.log(2 * 1560) / math.log(1560) / 128), rel=1e-12)
    assert inner.cost(site).pairs == site.tokens * 21 * 31 * 53
    plan = make_plan(resolve(load("freeswim_wan_1_3b_1080p")))
    assert plan.grid == site.grid
    assert plan.layers[0].pairs / plan.grid.tokens**2 == pytest.approx(0.2013, abs=0.00005)


@pytest.mark.parametrize("grid", [Grid(2, 4, 5), Grid(1, 5, 4), Grid(3, 1, 1)], ids=str)
def test_an_axis_shorter_than_the_window_is_whole(grid: Grid) -> None:
    """At the training grid, which is one short of the window, and below: full attention with scaled scores."""
    site = SITE.at(grid=grid)
    one = scenario(FreeswimSpec(trained=(4, 5), scaled=False), site)
    with torch.no_grad():
        assert_close("full", one.run(), same_weights(FullSpec(), one), EXACT)
        scaled = same_weights(FreeswimSpec(trained=(4, 5)), one)
        assert error_ratio(scaled, one.run()) > 1e-4


def test_only_the_short_axis_is_whole() -> None:
    seen = FreeswimSpec(trained=(8, 2)).expand(SITE).visible(SITE)[0]
    expected = np.kron(np.ones((2, 2), dtype=bool), np.kron(np.ones((7, 7), dtype=bool), published(9, 1)))
    assert (seen == expected).all()


@pytest.mark.parametrize(
    ("options", "path", "rule"),
    [
        # the logarithm to the base n needs n > 1
        ({"trained": [1, 5]}, "trained", "at least 2"),
        ({"trained": [5]}, "trained", "a list of 2"),
        ({"trained": [21, 30, 52]}, "trained", "a list of 2"),
        ({"scaled": "yes"}, "scaled", "true or false"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], path: str, rule: str) -> None:
    spec, problems = parse_part("attention", {"name": "freeswim", **options})
    assert spec is None
    assert [problem.path for problem in problems] == [path]
    assert rule in problems[0].rule


def test_an_unknown_kernel_is_refused() -> None:
    spec = FreeswimSpec(kernel="nobodys")
    assert [problem.path for problem in spec.problems(SITE)] == ["kernel"]
    with pytest.raises(SiteError, match="nobodys"):
        spec.build(SITE)


def test_a_kernel_without_bias_is_refused_where_windows_slide() -> None:
    (problem,) = FreeswimSpec(trained=(2, 2), kernel="flash_attn").problems(SITE)
    assert problem.path == "kernel"
    assert problem.rule == "'flash_attn' can never run for this design: takes no bias"
    # a window of the whole grid
    assert FreeswimSpec(trained=(100, 100), kernel="flash_attn").problems(SITE) == []
