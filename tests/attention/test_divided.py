"""TimeSformer's divided attention: published numbers, the fresh block, the two residuals, one frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attention.calls import same_weights
from tests.oracles.divided import divided, over_time
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.divided import DividedSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.layouts import WindowsSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import affine, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

ROPE = Rope(axes=(4, 2, 2))
SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 4, 5), has_timestep=False)
VIT_B = Site(dim=768, heads=12, head_dim=64, layers=12, grid=Grid(8, 14, 14), has_timestep=False)
FRAMES = BranchedSpec(branches={"space": BranchSpec(layout=WindowsSpec(size=(1, 0, 0)))})
EXACT = 1e-10


def scenario(spec: AttentionSpec, site: Site = SITE, **changes: Any) -> Scenario:
    return Scenario(Example(spec, site, "same"), torch.float64, **changes)


@pytest.mark.parametrize(("frames", "side"), [(8, 14), (16, 28), (96, 14)], ids=["base", "HR", "L"])
def test_counts_of_the_published_models(frames: int, side: int) -> None:
    # the paper counts N + F + 2 keys per query, 2 of them class tokens, which are extra tokens here
    cost = DividedSpec().cost(VIT_B.at(grid=Grid(frames, side, side)))
    assert cost.pairs == frames * side**2 * (side**2 + frames)
    time, space = cost.branches
    assert (time.pairs, space.pairs) == (frames**2 * side**2, frames * side**4)
    # a norm, three projections, an output and temporal_fc
    assert cost.parameters == 2 * 768 + 5 * (768 * 768 + 768)


@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
def test_a_fresh_block_attends_inside_each_frame(rope: Rope | None) -> None:
    site = SITE.at(rope=rope, qk_norm=rope is not None)
    fresh = scenario(DividedSpec(), site, random_weights=False, extra=True)
    with torch.no_grad():
        (y, y_extra), (space, space_extra) = fresh.run(), same_weights(FRAMES, fresh)
        assert torch.equal(y, space)
        assert torch.equal(y_extra, space_extra)
        # and is not full attention, except of one frame
        assert error_ratio(y, same_weights(FullSpec(), fresh)[0]) > 1e-2
        image = scenario(DividedSpec(), site.at(grid=Grid(1, 4, 5)), random_weights=False)
        assert error_ratio(image.run(), same_weights(FullSpec(), image)) < EXACT
        trained = scenario(DividedSpec(), site)
        assert error_ratio(trained.run(), same_weights(FRAMES, trained)) > 1e-2
    assert not DividedSpec().traits().exact_at_init


def test_temporal_projections_start_as_the_host_s() -> None:
    fresh = scenario(DividedSpec(), random_weights=False)
    attention: Any = fresh.runner.attention
    host: Any = fresh.runner.host
    for name in "qkv":
        assert torch.equal(attention.temporal[name].weight, getattr(host, name).weight)
        assert torch.equal(attention.temporal[name].bias, getattr(host, name).bias)
    assert torch.equal(attention.temporal_proj.weight, host.o.weight)
    assert torch.equal(attention.temporal_proj.bias, host.o.bias)
    assert not attention.temporal_fc.weight.any()
    assert not attention.temporal_fc.bias.any()


def test_both_residuals_reach_the_stream() -> None:
    """With a host that adds the result, the stream gains r, then attention in frames of z + r."""
    one = scenario(DividedSpec())
    case = one.case()
    residual = over_time(case)
    with torch.no_grad():
        space = same_weights(FRAMES, one).clone()
        moved = scenario(FRAMES)
        moved.runner.host = one.runner.host
        space_of_sum = moved.run(one.x + residual)
        got = one.run()
    assert error_ratio(got, residual + space_of_sum) < EXACT
    assert error_ratio(got, space_of_sum) > 1e-2
    assert error_ratio(got, residual + space) > 1e-2


@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
def test_one_frame_sees_only_its_own_values(rope: Rope | None) -> None:
    site = SITE.at(grid=Grid(1, 4, 5), rope=rope, qk_norm=True)
    one = scenario(DividedSpec(), site)
    case = one.case()
    normed = torch.nn.functional.layer_norm(
        case.x, (24,), case.weights["temporal_norm.weight"], case.weights["temporal_norm.bias"], 1e-6
    )
    value = affine(case.weights, "temporal_proj", affine(case.weights, "temporal.v", normed))
    assert error_ratio(over_time(case), affine(case.weights, "temporal_fc", value)) < EXACT
    one.run().square().sum().backward()
    gradients = {name: p.grad for name, p in one.runner.attention.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        # what would weigh frames against each other has nothing to weigh
        assert (float(gradient.abs().max()) < 1e-9) == name.startswith(("temporal.q", "temporal.k"))
    with torch.no_grad():
        assert error_ratio(one.run(), divided(case)) < EXACT


@pytest.mark.parametrize("grid", [(5, 1, 1), (2, 1, 7), (1, 1, 1), (7, 3, 2)])
def test_thin_grids(grid: tuple[int, int, int]) -> None:
    one = scenario(DividedSpec(), SITE.at(grid=Grid(*grid), rope=ROPE))
    with torch.no_grad():
        assert error_ratio(one.run(), divided(one.case())) < EXACT


def test_places_that_are_padding_in_every_frame() -> None:
    one = scenario(DividedSpec(), extra=True, key_valid=True)
    valid = one.key_valid
    assert valid is not None
    on_grid = valid.unflatten(1, tuple(SITE.grid))
    on_grid[:, :, 2, 3] = False
    on_grid[1, 2] = False
    with torch.no_grad():
        (y, y_extra), (expected, expected_extra) = one.run(), divided(one.case())
        one.x[~valid] = 1e4
        moved, moved_extra = one.run()
    assert bool(y.isfinite().all())
    assert error_ratio(y[valid], expected[valid]) < EXACT
    assert error_ratio(y_extra, expected_extra) < EXACT
    assert torch.equal(moved[valid], y[valid])
    assert torch.equal(moved_extra, y_extra)


def test_what_the_kernel_is_given() -> None:
    one = scenario(DividedSpec())
    one.x.requires_grad_()
    with record() as runs:
        one.run()
    assert [(run.q, run.k) for run in runs] == [((40, 3, 3, 8),) * 2, ((6, 3, 20, 8),) * 2]


def test_it_is_no_head_group_s_attention() -> None:
    spec = ByHeadSpec(groups={"0": DividedSpec(), "1-2": FullSpec()})
    (problem,) = spec.problems(SITE)
    assert problem.path == "groups.0"
    assert "all heads" in (problem.fix or "")
    with pytest.raises(SiteError, match="temporal residual"):
        spec.build(SITE)


@pytest.mark.parametrize("bad", [{"kernel": "no_such"}, {"frames": 8}])
def test_wrong_options(bad: dict[str, Any]) -> None:
    spec, problems = parse_part("attention", {"name": "divided", **bad})
    found = [*problems, *(spec.problems(SITE) if spec is not None else [])]
    assert [problem.path for problem in found] == list(bad)
