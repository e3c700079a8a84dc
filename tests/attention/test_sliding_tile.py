"""Sliding tiles: published densities, windows by head, tiles of images, odd windows as neighbourhoods, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention.calls import same_weights
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.neighborhood import NeighborhoodSpec
from ultrazoo.attention.sliding_tile import IMAGE_TILES, SlidingTileSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.recipe import make_plan, resolve
from ultrazoo.recipe.load import load
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=32, heads=4, head_dim=8, grid=Grid(6, 10, 14), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
HUNYUAN, WAN = Grid(30, 48, 80), Grid(18, 48, 80)


def scenario(spec: AttentionSpec, site: Site = SITE) -> Scenario:
    return Scenario(Example(spec, site, "sliding"), torch.float64)


def density(window: Any, grid: Grid) -> float:
    site = SITE.at(grid=grid)
    spec = SlidingTileSpec(window=window)
    assert spec.problems(site) == []
    cost = spec.cost(site)
    # whole tiles: what is visited is what is seen
    assert cost.visited_pairs == cost.pairs
    return cost.pairs / site.tokens**2


@pytest.mark.parametrize(
    ("window", "share"),
    [((3, 3, 3), 0.09), ((5, 5, 5), 0.41667), ((5, 3, 5), 0.25), ((5, 6, 10), 1.0), (("full", "full", "full"), 1.0)],
    ids=str,
)
def test_published_densities_of_one_window(window: Any, share: float) -> None:
    """(30, 48, 80) tokens, so (5, 6, 10) tiles."""
    assert density(window, HUNYUAN) == pytest.approx(share, abs=0.00001)


@pytest.mark.parametrize(
    ("grid", "tiles", "windows"),
    [
        (HUNYUAN, (5, 6, 10), [(5, 3, 3), (3, 3, 5), (1, 6, 10), (5, 6, 1), (5, 1, 10)]),
        (WAN, (3, 6, 10), [(3, 1, 10), (1, 5, 7), (3, 3, 3), (1, 6, 5), (1, 3, 10), (3, 6, 1)]),
    ],
    ids=["hunyuan", "wan"],
)
def test_candidates_of_the_published_search(
    grid: Grid, tiles: tuple[int, ...], windows: list[tuple[int, int, int]]
) -> None:
    """Every window is legal, even ones because they are the whole axis, and its share is the product of its shares."""
    for window in windows:
        share = np.prod([size / count for size, count in zip(window, tiles, strict=True)])
        assert density(window, grid) == pytest.approx(share, rel=1e-9)
    by_head = tuple(windows[head % len(windows)] for head in range(SITE.heads))
    mean = np.mean([density(window, grid) for window in by_head])
    assert density(by_head, grid) == pytest.approx(mean, rel=1e-9)


def test_the_recipe_at_the_published_size_has_the_published_density() -> None:
    plan = make_plan(resolve(load("sliding_tile_wan_14b_768p")))
    assert plan.grid == HUNYUAN
    assert plan.totals.attention_speedup == pytest.approx(1 / 0.09, rel=1e-3)


WINDOWS = ((1, 3, 3), (3, 1, "full"), (1, 3, 3), ("full", 3, 1))


def test_windows_by_head_equal_one_attention_per_head() -> None:
    spec = SlidingTileSpec(tile=(2, 2, 2), window=WINDOWS)  # type: ignore[arg-type]
    apart = ByHeadSpec(
        groups={str(i): SlidingTileSpec(tile=(2, 2, 2), window=one) for i, one in enumerate(WINDOWS)}  # type: ignore[arg-type]
    )
    one = scenario(spec)
    with torch.no_grad():
        expected = one.run()
        assert_close("one by one", same_weights(apart, one), expected, EXACT)
        mixed = SlidingTileSpec(tile=(2, 2, 2), window=(*WINDOWS[1:], WINDOWS[0]))  # type: ignore[arg-type]
        assert error_ratio(same_weights(mixed, one), expected) > 0.1
    assert spec.cost(SITE).pairs == apart.cost(SITE).pairs
    assert np.array_equal(spec.visible(SITE), apart.visible(SITE))


def test_ranges_of_heads_and_a_list_say_the_same() -> None:
    ranges: Mapping[str, Any] = {"3": WINDOWS[3], "0,2": WINDOWS[0], "1": WINDOWS[1]}
    listed = SlidingTileSpec(tile=(2, 2, 2), window=WINDOWS)  # type: ignore[arg-type]
    one = scenario(listed)
    with torch.no_grad():
        assert_close("ranges", same_weights(SlidingTileSpec(tile=(2, 2, 2), window=ranges), one), one.run(), EXACT)


def test_windows_by_head_come_from_a_recipe() -> None:
    spec, problems = parse_part(
        "attention", {"name": "sliding_tile", "tile": [2, 2, 2], "window": {"0-2": [1, 3, 3], "3": ["full", 1, 1]}}
    )
    assert problems == []
    assert [group.heads for group in spec.groups(SITE.grid, 4)] == [(0, 1, 2), (3,)]
    assert spec.traits().start.kind == "training-free"
    assert SlidingTileSpec().traits().start.kind == "needs tuning"


def test_heads_that_see_the_same_are_one_group() -> None:
    """Windows past the axis are the whole axis, whatever they say."""
    spec = SlidingTileSpec(tile=(2, 2, 2), window=((3, 5, 7), ("full", "full", "full"), (9, 8, 21), (4, 6, 8)))
    groups = spec.groups(SITE.grid, 4)
    assert [group.name for group in groups] == ["3x5x7"]
    one = scenario(spec)
    with torch.no_grad():
        assert_close("full", one.run(), same_weights(FullSpec(), one), EXACT)


@pytest.mark.parametrize(("tile", "window"), [((2, 2, 2), (1, 3, 5)), ((3, 5, 2), (1, 1, 3)), ((1, 2, 7), (3, 3, 1))])
def test_an_odd_window_over_tiles_that_divide_is_a_neighbourhood(tile: Any, window: Any) -> None:
    kernel = tuple(size * many for size, many in zip(tile, window, strict=True))
    one = scenario(SlidingTileSpec(tile=tile, window=window))
    with torch.no_grad():
        expected = one.run()
        got = same_weights(NeighborhoodSpec(kernel_size=kernel, stride=tile), one)
        assert_close("neighbourhood", got, expected, EXACT)
        assert error_ratio(same_weights(NeighborhoodSpec(kernel_size=kernel, short="whole"), one), expected) > 0.05


def test_windows_move_inwards_at_borders_and_tiles_are_all_or_nothing() -> None:
    site = SITE.at(grid=Grid(1, 1, 11))
    seen = SlidingTileSpec(tile=(1, 1, 2), window=(1, 1, 3)).visible(site)[0]
    keys = [np.flatnonzero(row).tolist() for row in seen]
    # six tiles, the last of one token
    assert keys[0] == keys[1] == keys[2] == keys[3] == list(range(6))
    assert keys[4] == keys[5] == list(range(2, 8))
    assert keys[10] == keys[9] == keys[8] == list(range(6, 11))


def test_text_is_seen_by_all_and_sees_all() -> None:
    one = Scenario(Example(SlidingTileSpec(tile=(2, 2, 2), window=(1, 1, 1)), SITE, "text"), torch.float64, extra=True)
    with torch.no_grad():
        y, text = one.run()
        assert one.extra is not None
        full_y, full_text = same_weights(FullSpec(), one)
        assert_close("text rows", text, full_text, EXACT)
        assert error_ratio(y, full_y) > 0.1
        values = one.extra.v.clone()
        values[:, 0] += 1
        moved = one.run(extra=one.masked_extra(v=values))[0] - y
    assert bool((moved.abs().amax(-1) > 0).all())


@pytest.mark.parametrize(
    ("tile", "flat"),
    [((6, 8, 8), (1, 16, 24)), ((2, 8, 8), (1, 16, 8)), ((4, 4, 4), (1, 8, 8)), ((4, 2, 2), (1, 4, 4))],
    ids=str,
)
def test_an_image_takes_a_flat_tile_of_the_same_volume(tile: Any, flat: Any) -> None:
    assert np.prod(tile) == np.prod(flat)
    assert IMAGE_TILES[int(np.prod(tile))] == flat
    image = SITE.at(grid=Grid(1, 3 * flat[1] + 1, 3 * flat[2]), heads=1, dim=8, rope=None)
    one = scenario(SlidingTileSpec(tile=tile, window=(3, 1, 3)), image)
    with torch.no_grad():
        expected = one.run()
        assert_close("flat", same_weights(SlidingTileSpec(tile=flat, window=(1, 1, 3)), one), expected, EXACT)
        assert error_ratio(same_weights(SlidingTileSpec(tile=(1, 5, 7), window=(1, 1, 3)), one), expected) > 0.05


def test_a_flat_tile_stays_what_it_is_in_an_image() -> None:
    assert SlidingTileSpec(tile=(1, 6, 4)).tile_at(Grid(1, 48, 80)) == (1, 6, 4)
    assert SlidingTileSpec(tile=(6, 8, 8)).tile_at(Grid(2, 48, 80)) == (6, 8, 8)


def refused(spec: SlidingTileSpec, site: Site = SITE) -> list[tuple[str, str, str]]:
    found = [(problem.path, problem.rule, problem.fix or "") for problem in spec.problems(site)]
    if found:
        with pytest.raises(SiteError):
            spec.build(site)
    return found


@pytest.mark.parametrize(
    ("window", "path", "rule", "fix"),
    [
        ((1, 2, 3), "window", "an even window of 2 tiles along h has no middle", "use 1, 3 or full, which is 5"),
        ((1, 4, 3), "window", "an even window of 4 tiles along h", "use 3 or full, which is 5"),
        ((2, 1, 1), "window", "an even window of 2 tiles along t", "use 1 or full, which is 3"),
        (((1, 1, 1),) * 3 + ((1, 1, 6),), "window.3", "an even window of 6 tiles along w", "use 5 or full, which is 7"),
        ({"0-2": (1, 1, 1), "3": (1, 1, 4)}, "window.3", "an even window of 4 tiles along w", "use 3, 5 or full"),
    ],
    ids=str,
)
def test_even_windows_are_refused(window: Any, path: str, rule: str, fix: str) -> None:
    found = refused(SlidingTileSpec(tile=(2, 2, 2), window=window))
    assert [one[0] for one in found] == [path]
    assert rule in found[0][1]
    assert fix in found[0][2]


def test_an_even_window_that_is_the_whole_axis_is_no_problem() -> None:
    assert refused(SlidingTileSpec(tile=(3, 5, 7), window=(2, 2, 2))) == []
    assert refused(SlidingTileSpec(tile=(3, 5, 2), window=(2, 4, 8))) == []


def test_tiles_larger_than_the_grid_are_refused_axis_by_axis() -> None:
    found = refused(SlidingTileSpec(tile=(7, 11, 14)))
    assert found == [
        ("tile", "7 along t is more than the 6 tokens there", "use 1 to 6 along t, or short: whole"),
        ("tile", "11 along h is more than the 10 tokens there", "use 1 to 10 along h, or short: whole"),
    ]
    assert refused(SlidingTileSpec(tile=(6, 10, 14))) == []
    column = refused(SlidingTileSpec(tile=(2, 2, 2), window=(1, 1, 1)), SITE.at(grid=Grid(4, 4, 1)))
    assert column[0][2] == "use 1 along w, or short: whole"


def test_short_axes_are_one_tile_where_that_is_asked_for() -> None:
    spec = SlidingTileSpec(tile=(7, 2, 40), window=(3, 1, 3), short="whole")
    assert refused(spec) == []
    one = scenario(spec)
    with torch.no_grad():
        expected = same_weights(SlidingTileSpec(tile=(6, 2, 14), window=(1, 1, 1)), one)
        assert_close("short: whole", one.run(), expected, EXACT)


def test_images_without_a_tile_are_refused() -> None:
    image = SITE.at(grid=Grid(1, 40, 40))
    assert refused(SlidingTileSpec(tile=(3, 5, 5)), image) == [
        (
            "tile",
            "an image has no tile for 75 tokens; volumes with one are 384, 128, 64, 16",
            "for images give a flat tile, [1, 5, 5]",
        )
    ]
    small = refused(SlidingTileSpec(), SITE.at(grid=Grid(1, 40, 20)))
    assert small == [
        (
            "tile",
            "an image's tile of 24 along w is more than the 20 tokens there",
            "give a flat tile, [1, 8, 8], with 1 to 20 along w, or short: whole",
        )
    ]


@pytest.mark.parametrize(
    ("window", "path", "said"),
    [
        (((1, 1, 1),) * 3, "window", "windows for 3 heads, the attention has 4"),
        ((), "window", "there is none"),
        ({"0-2": (1, 1, 1)}, "window", "no group has head 3"),
        ({"0-3": (1, 1, 1), "2": (1, 1, 3)}, "window.2", "head 2 is in group '0-3' too"),
        ({"0-4": (1, 1, 1)}, "window.0-4", "head 4 does not exist: heads are 0-3"),
        ({"all": (1, 1, 1)}, "window.all", "not a head or a range of heads"),
    ],
    ids=str,
)
def test_windows_for_the_wrong_heads_are_problems(window: Any, path: str, said: str) -> None:
    found = refused(SlidingTileSpec(tile=(2, 2, 2), window=window))
    assert found[0][0] == path
    assert said in found[0][1]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"tile": [0, 8, 8]}, "tile"),
        ({"tile": [6, 8]}, "tile"),
        ({"window": [3, 3]}, "window"),
        ({"window": [3, 0, 3]}, "window"),
        ({"window": [3, 3, "all"]}, "window"),
        ({"short": "pad"}, "short"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], path: str) -> None:
    spec, problems = parse_part("attention", {"name": "sliding_tile", **options})
    assert spec is None
    assert problems[0].path.startswith(path)


def test_a_kernel_without_bias_is_refused_where_tiles_are_joined_with_masks() -> None:
    """Tiles of their own need none; where small ones are joined, for fewer copies of keys, they do."""
    site = SITE.at(grid=Grid(4, 12, 12))
    (problem,) = refused(SlidingTileSpec(tile=(1, 1, 1), window=(1, 3, 3), kernel="flash_attn"), site)
    assert problem[:2] == ("kernel", "'flash_attn' can never run for this design: takes no bias")
    assert "sdpa" in problem[2]
    assert refused(SlidingTileSpec(tile=(4, 12, 12), window=(1, 1, 1), kernel="flash_attn"), site) == []


@pytest.mark.parametrize(
    ("window", "exact"),
    [
        (("full", "full", "full"), True),
        ((("full", "full", "full"), ("full", "full", "full")), True),
        ((("full", "full", "full"), ("full", "full", 3)), False),
        ((3, "full", "full"), False),
    ],
    ids=str,
)
def test_whole_windows_are_an_exact_start(window: Any, exact: bool) -> None:
    traits = SlidingTileSpec(tile=(1, 2, 2), window=window).traits()
    assert (traits.exact_at_init, traits.start.kind == "exact") == (exact, exact)
