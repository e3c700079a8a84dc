"""PVTv2's and Twins' reduced keys: published numbers, what they equal, edges and wrong options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.attention.calls import same_weights
from tests.oracles.spatial_reduction import spatial_reduction
from tests.recipe.samples import resolved
from ultrazoo import recipe
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.compressors import AvgPoolSpec
from ultrazoo.attention.spatial_reduction import SpatialReductionSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import error_ratio
from ultrazoo.testing.scenario import Example, Scenario

ROPE = Rope(axes=(4, 2, 2))
SITE = Site(dim=20, heads=3, head_dim=8, grid=Grid(2, 5, 7), has_timestep=False)
EXACT = 1e-10
STAGES = [(64, 1, 56, 8), (128, 2, 28, 4), (320, 5, 14, 2), (512, 8, 7, 1)]
"""PVTv2-B2 at 224 pixels: channels, heads, tokens a side, R."""


def scenario(spec: AttentionSpec, site: Site = SITE, **changes: Any) -> Scenario:
    return Scenario(Example(spec, site, "same"), torch.float64, **changes)


def distance_from_oracle(one: Scenario) -> float:
    with torch.no_grad():
        return error_ratio(one.run(), spatial_reduction(one.case()))


@pytest.mark.parametrize(("dim", "heads", "side", "factor"), STAGES)
def test_every_stage_has_49_keys(dim: int, heads: int, side: int, factor: int) -> None:
    site = Site(dim=dim, heads=heads, head_dim=dim // heads, grid=Grid(1, side, side))
    for spec in (SpatialReductionSpec(factor=factor), SpatialReductionSpec(mode="pool")):
        cost = spec.cost(site)
        assert cost.pairs == side**2 * 49
    parameters = SpatialReductionSpec(factor=factor).cost(site).parameters
    assert parameters == (0 if factor == 1 else dim * dim * factor**2 + dim + 2 * dim)


def test_twins_alternates_windows_and_a_reduced_map() -> None:
    plan = recipe.make_plan(resolved("twins_224"))
    assert [spec.name for spec in plan.resolved.attention] == ["branched", "spatial_reduction"] * 9
    # 4 windows of 49 tokens, then 196 queries on 49 keys: the same count
    local, wide = (layer.attention_flops for layer in plan.layers[:2])
    assert local == wide == 4 * 196 * 49 * 384


def test_pooling_is_linear_in_the_tokens_of_a_frame() -> None:
    small, large = (SITE.at(grid=Grid(1, side, side)) for side in (28, 56))
    spec = SpatialReductionSpec(mode="pool")
    assert spec.cost(large).pairs == 4 * spec.cost(small).pairs
    # frames are reduced one by one
    assert spec.cost(small.at(grid=Grid(3, 28, 28))).pairs == 9 * spec.cost(small).pairs


@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
def test_one_token_per_cell_is_full_attention(rope: Rope | None) -> None:
    one = scenario(SpatialReductionSpec(factor=1), SITE.at(rope=rope, qk_norm=True), extra=True)
    assert SpatialReductionSpec(factor=1).traits().exact_at_init
    assert list(one.runner.attention.parameters()) == []
    with torch.no_grad():
        full, full_extra = same_weights(FullSpec(), one)
        y, y_extra = one.run()
        assert error_ratio(y, full) < EXACT
        assert error_ratio(y_extra, full_extra) < EXACT
        two = scenario(SpatialReductionSpec(factor=2), SITE.at(rope=rope, qk_norm=True))
        assert error_ratio(two.run(), full) > 1e-2


@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
def test_a_convolution_that_averages_without_its_norm_is_pooling(rope: Rope | None) -> None:
    one = scenario(SpatialReductionSpec(factor=(2, 3)), SITE.at(rope=rope, qk_norm=True))
    attention: Any = one.runner.attention
    pooled = BranchedSpec(branches={"only": BranchSpec(compress=AvgPoolSpec(factor=(2, 3), of="keys"))})
    with torch.no_grad():
        attention.sr.weight.copy_(torch.eye(20, dtype=torch.float64)[..., None, None].expand(-1, -1, 2, 3) / 6)
        attention.sr.bias.zero_()
        expected = same_weights(pooled, one)
        assert error_ratio(one.run(), expected) > 1e-2
        attention.norm = torch.nn.Identity()
        assert error_ratio(one.run(), expected) < EXACT


@pytest.mark.parametrize("factor", [2, (2, 3), (2, 2, 3)])
def test_the_map_is_torch_s_own_convolution_where_cells_are_whole(factor: Any) -> None:
    site = SITE.at(grid=Grid(2, 6, 6))
    one = scenario(SpatialReductionSpec(factor=factor), site)
    attention: Any = one.runner.attention
    z = one.x.unflatten(1, tuple(site.grid))
    with torch.no_grad():
        rows, _ = attention._cells(z, None)
        got = F.linear(rows, attention.sr.weight.flatten(2).transpose(1, 2).flatten(1), attention.sr.bias)
        if len(attention.sr.kernel_size) == 3:
            expected = attention.sr(z.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        else:
            expected = attention.sr(z.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, (2, 2))
    assert error_ratio(got, expected) < EXACT


def test_weights_start_as_the_released_ones_do() -> None:
    one = scenario(SpatialReductionSpec(factor=4), SITE.at(dim=60), random_weights=False)
    attention: Any = one.runner.attention
    # variance 2 / fan-out
    assert float(attention.sr.weight.detach().std()) == pytest.approx((2 / (16 * 60)) ** 0.5, rel=0.05)
    assert not attention.sr.bias.any()
    assert bool((attention.norm.weight == 1).all())
    with torch.no_grad():
        assert error_ratio(one.run(), same_weights(FullSpec(), one)) > 0.1


@pytest.mark.parametrize("factor", [9, (5, 7), (1, 50), (3, 9, 9)])
def test_cells_larger_than_the_grid(factor: Any) -> None:
    spec = SpatialReductionSpec(factor=factor)
    assert spec.problems(SITE) == []
    assert distance_from_oracle(scenario(spec)) < EXACT


@pytest.mark.parametrize("grid", [(1, 5, 6), (2, 1, 1), (1, 1, 9), (2, 13, 15)])
@pytest.mark.parametrize("cell", ["centre", "index"])
def test_averages_of_grids_smaller_and_larger_than_seven(grid: tuple[int, int, int], cell: Any) -> None:
    # fewer than 7 tokens a side are repeated, as adaptive pooling does: 49 keys of 30 tokens
    site = SITE.at(grid=Grid(*grid), rope=ROPE)
    spec = SpatialReductionSpec(mode="pool", cell=cell)
    assert spec.cost(site).pairs == site.tokens * grid[0] * 49
    assert distance_from_oracle(scenario(spec, site)) < EXACT


@pytest.mark.parametrize(
    "spec",
    [SpatialReductionSpec(factor=3), SpatialReductionSpec(mode="pool", size=(3, 2)), SpatialReductionSpec(factor=1)],
)
def test_padding_of_any_shape(spec: SpatialReductionSpec) -> None:
    one = scenario(spec, SITE.at(qk_norm=True, rope=ROPE), key_valid=True)
    valid = one.key_valid
    assert valid is not None
    # a whole frame of the second sample is padding
    valid[1, 35:] = False
    with torch.no_grad():
        got, expected = one.run(), spatial_reduction(one.case())
    assert error_ratio(got[valid], expected[valid]) < EXACT


def test_what_the_kernel_is_given() -> None:
    one = scenario(SpatialReductionSpec(factor=(2, 3)))
    with torch.no_grad(), record() as runs:
        one.run()
    assert [(run.q, run.k) for run in runs] == [((2, 3, 70, 8), (2, 3, 2 * 3 * 3, 8))]


@pytest.mark.parametrize(
    ("options", "path", "fix"),
    [
        ({"factor": (2, 2, 2, 2)}, "factor", "give one, two or three numbers"),
        ({"mode": "pool", "factor": 4}, "factor", "give size"),
        ({"size": 5}, "size", "give factor"),
        ({"cell": "index"}, "cell", "leave cell out"),
        ({"kernel": "no_such"}, "kernel", ""),
    ],
)
def test_wrong_options(options: dict[str, Any], path: str, fix: str) -> None:
    spec = SpatialReductionSpec(**options)
    (problem,) = spec.problems(SITE)
    assert problem.path == path
    assert fix in (problem.fix or "")
    with pytest.raises(SiteError):
        spec.build(SITE)


@pytest.mark.parametrize("bad", [{"factor": 0}, {"size": [7, 0]}, {"size": [7, 7, 7]}, {"mode": "linear"}])
def test_wrong_values(bad: dict[str, Any]) -> None:
    spec, problems = parse_part("attention", {"name": "spatial_reduction", **bad})
    assert spec is None
    (key,) = bad
    assert {problem.path.split(".")[0] for problem in problems} == {key}
