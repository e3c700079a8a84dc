"""SANA-Video's softmax branch beside linear attention: windows, its factor, what it does not see, and layers of both kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ultrazoo
from tests.oracles.linear import linear as oracle
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.linear import LinearSpec
from ultrazoo.attention.softmax_branch import SoftmaxBranchSpec
from ultrazoo.attention.standalone import reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import assert_close, dense, error_ratio
from ultrazoo.testing.scenario import Example, Scenario, pair_up

SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 4, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)


def spec_of(**options: Any) -> LinearSpec:
    return LinearSpec(softmax_branch=SoftmaxBranchSpec(**options))


def scenario_of(spec: LinearSpec, site: Site = SITE, **options: Any) -> Scenario:
    return Scenario(Example(spec, site, "beside"), torch.float64, **options)


@pytest.mark.parametrize("windows", [None, (1, 1, 4), (3, 2, 2), (1, 1, 1), (2, 4, 7)], ids=str)
@pytest.mark.parametrize("holes", [False, True], ids=["", "holes"])
def test_windows_equal_the_oracle(windows: tuple[int, int, int] | None, holes: bool) -> None:
    scenario = scenario_of(spec_of(windows=windows), extra=True, key_valid=holes)
    with torch.no_grad():
        found = scenario.run()
    for name, got, wanted in pair_up(found, oracle(scenario.case())):
        real = scenario.key_valid if holes and got.shape[1] == SITE.tokens else slice(None)
        assert_close(name, got[real], wanted[real], 1e-10)


def test_one_window_everywhere_is_no_window() -> None:
    one, none = scenario_of(spec_of(windows=(1, 1, 1))), scenario_of(spec_of())
    none.runner.load_state_dict(one.runner.state_dict())
    with torch.no_grad():
        assert_close("output", none.run(one.x), one.run(), 1e-12)


def test_the_factor_starts_where_it_is_told() -> None:
    """At 100 as released; at 0 a fresh block is linear attention alone, and the factor has a gradient."""
    fresh: dict[str, Any] = {"random_weights": False}
    released = scenario_of(spec_of(), **fresh).runner.attention.beside.scale
    assert released.item() == 100.0
    scenario = scenario_of(spec_of(scale=0.0), **fresh)
    alone = scenario_of(LinearSpec(), **fresh)
    alone.runner.host.load_state_dict(scenario.runner.host.state_dict())
    found = scenario.run()
    assert_close("linear alone", found.detach(), alone.run(scenario.x).detach(), 1e-12)
    found.square().sum().backward()
    assert float(scenario.runner.attention.beside.scale.grad.abs()) > 1e-6


def test_beside_nothing_it_is_softmax_attention_with_its_own_projections() -> None:
    """Weights of the host put into the branch and its part of the values out of the other: full attention."""
    scenario = scenario_of(spec_of(scale=1.0))
    host, branch = scenario.runner.host, scenario.runner.attention.beside
    wanted = dense(scenario.case())
    with torch.no_grad():
        for own, other in (("q", "q"), ("k", "k"), ("v", "v"), ("proj", "o")):
            getattr(branch, own).load_state_dict(getattr(host, other).state_dict())
        for name in ("norm_q", "norm_k"):
            getattr(branch, name).copy_(getattr(host, name))
        branch.scale.fill_(1.0)
        both = scenario.run()
        branch.scale.fill_(0.0)
        linear = scenario.run()
    assert isinstance(wanted, torch.Tensor)
    assert_close("softmax", both - linear, wanted, 1e-9)
    assert error_ratio(both, wanted) > 0.1


@pytest.mark.parametrize(
    ("options", "site", "path", "fix"),
    [
        ({"softmax_branch": SoftmaxBranchSpec(windows=(1, 1, 8))}, SITE, "softmax_branch.windows", "at most 7"),
        (
            {"softmax_branch": SoftmaxBranchSpec(windows=(4, 2))},
            SITE,
            "softmax_branch.windows",
            "give three: (T, H, W)",
        ),
        (
            {"softmax_branch": SoftmaxBranchSpec(), "causal_chunks": 2},
            SITE,
            "softmax_branch",
            "use causal_chunks: null, or no softmax_branch",
        ),
        ({"softmax_branch": SoftmaxBranchSpec(kernel="none such")}, SITE, "softmax_branch.kernel", None),
    ],
    ids=["more windows than tokens", "two numbers", "causal", "kernel"],
)
def test_bad_options_are_problems(options: dict[str, Any], site: Site, path: str, fix: str | None) -> None:
    (problem,) = LinearSpec(**options).problems(site)
    assert problem.path == path
    assert fix is None or problem.fix == fix


def test_a_group_of_heads_has_no_stream_to_add_to() -> None:
    (problem,) = ByHeadSpec(groups={"0-1": spec_of(), "2": FullSpec()}).problems(SITE)
    assert problem.path == "groups.0-1.softmax_branch"


def recipe(attention: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "beside",
        "video": {"grid": [2, 4, 6]},
        "backbone": {"name": "wan", "dim": 24, "layers": 4, "heads": 2, "ffn_dim": 32, "text_dim": 8, "text_tokens": 4},
        "attention": attention,
        "dtype": "float32",
    }


def test_recipes_say_it_by_layer() -> None:
    """The branch in some layers, softmax attention instead of linear attention in others: settings of a recipe."""
    mixed = {
        "*": {"name": "linear"},
        "1": {"name": "linear", "softmax_branch": {"windows": [1, 1, 3]}},
        "3": {"name": "full"},
    }
    model = ultrazoo.build(recipe(mixed))
    plan = ultrazoo.plan(recipe(mixed))
    assert [layer.attention for layer in plan.layers] == ["linear", "linear", "linear", "full"]
    assert [layer.pairs for layer in plan.layers] == [0, 48 * 48 // 3, 0, 48 * 48]
    # what its scale starts at, and no other layer has one
    scales = {name: float(p.detach()) for name, p in model.named_parameters() if name.endswith("beside.scale")}
    assert len(scales) == 1
    assert list(scales.values()) == [100.0]
    with torch.no_grad():
        y = model(torch.randn(1, 16, 2, 8, 12), torch.tensor([500.0]), torch.randn(1, 4, 8))
    assert bool(y.isfinite().all())


def test_a_factory_makes_it() -> None:
    block = ultrazoo.create_attention("linear", dim=16, heads=2, softmax_branch={"windows": [1, 2, 2]}, qk_norm=True)
    reset_parameters(block)
    with torch.no_grad():
        assert bool(block(torch.randn(2, 30, 16), (1, 5, 6)).isfinite().all())
