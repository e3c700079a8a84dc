"""PixArt-Sigma's compression of keys: published numbers, what it equals, edges and wrong options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.attention.calls import same_weights
from tests.oracles.kv_compress import kv_compress
from tests.recipe.samples import resolved
from ultrazoo import recipe
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.kv_compress import KvCompressSpec
from ultrazoo.attention.parts.compressors import AvgPoolSpec, StrideSpec
from ultrazoo.attention.parts.coords import CoordsSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import error_ratio
from ultrazoo.testing.scenario import Example, Scenario

MODES = ("conv", "uniform", "average", "uniform_every")
ROPE = Rope(axes=(4, 2, 2))
SITE = Site(dim=20, heads=3, head_dim=8, grid=Grid(2, 5, 7), has_timestep=False)
SIGMA = Site(dim=1152, heads=16, head_dim=72, layer=14, layers=28, grid=Grid(1, 64, 64), has_timestep=False)
EXACT = 1e-10


def scenario(spec: AttentionSpec, site: Site = SITE, **changes: Any) -> Scenario:
    return Scenario(Example(spec, site, "same"), torch.float64, **changes)


def close_to_oracle(spec: KvCompressSpec, site: Site, **changes: Any) -> float:
    one = scenario(spec, site, **changes)
    with torch.no_grad():
        got, expected = one.run(), kv_compress(one.case())
    return error_ratio(got, expected)


def test_counts_at_1024_pixels() -> None:
    # 64 x 64 tokens on 32 x 32 keys; one convolution and one norm for both K and V
    cost = KvCompressSpec().cost(SIGMA)
    assert cost.pairs == 4096 * 1024
    assert FullSpec().cost(SIGMA).pairs == 4 * cost.pairs
    assert cost.parameters == 1152 * (4 + 1) + 2 * 1152
    assert KvCompressSpec(factor=4).cost(SIGMA).pairs == 4096 * 256


def test_the_published_recipe_compresses_the_second_half() -> None:
    plan = recipe.make_plan(resolved("kv_compress_1024"))
    assert plan.grid == SIGMA.grid
    assert [spec.name for spec in plan.resolved.attention] == ["full"] * 14 + ["kv_compress"] * 14
    # 14 whole layers and 14 quarters
    assert plan.totals.attention_speedup == pytest.approx(28 / (14 + 14 / 4))


def test_border_cells_are_kept() -> None:
    # the released code would make 31 x 32 keys of 63 x 65 tokens
    assert KvCompressSpec().keys(Grid(1, 63, 65)) == 32 * 33
    assert KvCompressSpec(mode="uniform_every").keys(Grid(1, 3, 5)) == 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
def test_one_token_per_cell_is_full_attention(mode: Any, rope: Rope | None) -> None:
    site = SITE.at(rope=rope, qk_norm=True)
    one = scenario(KvCompressSpec(mode=mode, factor=1), site)
    assert KvCompressSpec(mode=mode, factor=1).traits().exact_at_init
    assert list(one.runner.attention.parameters()) == []
    with torch.no_grad():
        full = same_weights(FullSpec(), one)
        assert error_ratio(one.run(), full) < EXACT
        smaller = scenario(KvCompressSpec(mode=mode, factor=2), site)
        assert error_ratio(smaller.run(), full) > 1e-2


def branched(compress: Any, coords: CoordsSpec | None = None) -> BranchedSpec:
    return BranchedSpec(branches={"only": BranchSpec(compress=compress, coords=coords or CoordsSpec())})


def test_kept_tokens_may_as_well_be_picked_before_projection() -> None:
    for site, cell in ((SITE, None), (SITE.at(rope=ROPE, qk_norm=True), "centre")):
        one = scenario(KvCompressSpec(mode="uniform", cell=cell), site)
        with torch.no_grad():
            other = same_weights(branched(StrideSpec(factor=2, of="keys")), one)
            assert error_ratio(one.run(), other) < EXACT


def test_means_before_and_after_projection_differ_by_the_norm_between() -> None:
    before = branched(AvgPoolSpec(factor=2, of="keys"))
    for norm, low, high in ((False, 0.0, EXACT), (True, 1e-3, 1.0)):
        one = scenario(KvCompressSpec(mode="average"), SITE.at(rope=ROPE, qk_norm=norm))
        with torch.no_grad():
            found = error_ratio(one.run(), same_weights(before, one))
        assert low <= found <= high


def test_the_fresh_convolution_is_a_mean_but_not_pooled_attention() -> None:
    fresh = scenario(KvCompressSpec(), random_weights=False)
    attention: Any = fresh.runner.attention
    assert torch.equal(attention.sr.weight, torch.full_like(attention.sr.weight, 0.25))
    assert not attention.sr.bias.any()
    with torch.no_grad():
        mean = same_weights(KvCompressSpec(mode="average"), fresh)
        assert error_ratio(fresh.run(), mean) > 1e-2
        # the norm is all that lies between them
        attention.norm = torch.nn.Identity()
        assert error_ratio(fresh.run(), mean) < EXACT


def test_the_released_mode_ave_takes_one_token_and_ours_takes_the_mean() -> None:
    z = torch.randn(2, 1, 6, 8, 3, dtype=torch.float64)
    nearest = F.interpolate(z[:, 0].permute(0, 3, 1, 2), scale_factor=0.5, mode="nearest").permute(0, 2, 3, 1)
    assert torch.equal(nearest, z[:, 0, ::2, ::2])
    site = SITE.at(grid=Grid(1, 6, 8))
    uniform, average = scenario(KvCompressSpec(mode="uniform"), site), scenario(KvCompressSpec(mode="average"), site)
    assert error_ratio(average.run(), uniform.run()) > 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("factor", "keys"), [(9, 2), ((5, 7), 2), ((3, 50, 1), 7)], ids=["9", "5x7", "3x50x1"])
def test_cells_larger_than_the_grid(mode: Any, factor: Any, keys: int) -> None:
    if mode == "uniform_every":
        factor, keys = 1000, 1
    spec = KvCompressSpec(mode=mode, factor=factor)
    assert spec.problems(SITE) == []
    assert spec.keys(SITE.grid) == keys
    assert close_to_oracle(spec, SITE) < EXACT


@pytest.mark.parametrize("mode", MODES)
def test_one_frame_and_one_token(mode: Any) -> None:
    assert close_to_oracle(KvCompressSpec(mode=mode, factor=2), SITE.at(grid=Grid(1, 5, 7), rope=ROPE)) < EXACT
    if mode != "uniform_every":
        assert close_to_oracle(KvCompressSpec(mode=mode, factor=(2, 2, 2)), SITE.at(grid=Grid(1, 5, 7))) < EXACT
    assert close_to_oracle(KvCompressSpec(mode=mode), SITE.at(grid=Grid(1, 1, 1), rope=ROPE)) < EXACT


@pytest.mark.parametrize("mode", ["uniform", "average", "conv"])
@pytest.mark.parametrize("cell", ["centre", "index", None])
def test_coordinates_of_compressed_keys(mode: Any, cell: Any) -> None:
    site = SITE.at(rope=ROPE, qk_norm=True)
    spec = KvCompressSpec(mode=mode, factor=(2, 3), cell=cell)
    assert close_to_oracle(spec, site) < EXACT
    one = scenario(spec, site)
    for other in ("centre", "index"):
        with torch.no_grad():
            distance = error_ratio(same_weights(KvCompressSpec(mode=mode, factor=(2, 3), cell=other), one), one.run())
        assert (distance < EXACT) == (other == cell or (cell is None and other == "centre" and mode != "uniform"))


def test_a_mean_over_padding_is_the_mean_of_what_is_real() -> None:
    padded, cut = SITE.at(grid=Grid(2, 5, 8)), SITE.at(grid=Grid(2, 5, 7))
    one = scenario(KvCompressSpec(mode="average"), padded, key_valid=True)
    valid = torch.ones(2, *padded.grid, dtype=torch.bool)
    valid[..., -1] = False
    with torch.no_grad():
        wide = one.run(key_valid=valid.flatten(1)).unflatten(1, tuple(padded.grid))[:, :, :, :7].flatten(1, 3)
        x = one.x.unflatten(1, tuple(padded.grid))[:, :, :, :7].flatten(1, 3)
        assert error_ratio(wide, one.runner(x, cut.grid)) < EXACT


@pytest.mark.parametrize("mode", MODES)
def test_padding_of_any_shape(mode: Any) -> None:
    one = scenario(KvCompressSpec(mode=mode, factor=3), SITE.at(qk_norm=True), key_valid=True)
    with torch.no_grad():
        got, expected = one.run(), kv_compress(one.case())
    assert one.key_valid is not None
    assert error_ratio(got[one.key_valid], expected[one.key_valid]) < EXACT


def test_what_the_kernel_is_given() -> None:
    one = scenario(KvCompressSpec(factor=(2, 3)))
    with torch.no_grad(), record() as runs:
        one.run()
    assert [(run.q, run.k) for run in runs] == [((2, 3, 70, 8), (2, 3, 2 * 3 * 3, 8))]


@pytest.mark.parametrize(
    ("options", "rope", "path", "fix"),
    [
        ({"factor": (2, 2, 2, 2)}, None, "factor", ""),
        ({"mode": "uniform_every", "factor": (2, 2)}, None, "factor", "give one number"),
        ({"mode": "uniform_every", "cell": "index"}, ROPE, "cell", "leave cell out"),
        ({"cell": "index"}, None, "cell", "leave cell out"),
        ({"kernel": "no_such"}, None, "kernel", ""),
    ],
)
def test_wrong_options(options: dict[str, Any], rope: Rope | None, path: str, fix: str) -> None:
    spec = KvCompressSpec(**options)
    (problem,) = spec.problems(SITE.at(rope=rope))
    assert problem.path == path
    assert fix in (problem.fix or "")
    with pytest.raises(SiteError):
        spec.build(SITE.at(rope=rope))


@pytest.mark.parametrize("bad", [{"factor": 0}, {"factor": [2, -1]}, {"factor": 2.5}, {"mode": "ave"}, {"layers": 14}])
def test_wrong_values(bad: dict[str, Any]) -> None:
    spec, problems = parse_part("attention", {"name": "kv_compress", **bad})
    assert spec is None
    (key,) = bad
    assert [problem.path.split(".")[0] for problem in problems] == [key]
