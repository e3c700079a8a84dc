"""Blocks without a single valid token: they are no key, no mean, no part of a moment or a state, and never NaN."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from ultrazoo.attention.pisa import PisaSpec
from ultrazoo.attention.sla2 import Sla2Spec
from ultrazoo.attention.sol import SolSpec
from ultrazoo.attention.sparse_linear import SparseLinearSpec
from ultrazoo.attention.subblock import SubblockSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario, pair_up

SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 4, 5), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
SPECS: list[AttentionSpec] = [
    SolSpec(tau=0.2, block=4),
    SolSpec(tau=0.2, block=4, moments="exact", order="morton"),
    SolSpec(tau=None, block=4),
    SubblockSpec(block=4, runs=(2, 2), multiple=2),
    PisaSpec(block=4, density=0.3),
    PisaSpec(block=4, density=1.0, score="variance"),
    SparseLinearSpec(block=(8, 4)),
    SparseLinearSpec(form="paper", block=(4, 4), share=0.2, skip=0.3),
    Sla2Spec(block=(8, 4), share=0.2),
    Sla2Spec(block=(8, 4), share=1.0),
    Sla2Spec(block=(8, 4), share=0.2, router="soft"),
]


def scenario_of(spec: AttentionSpec, grid: Grid, invalid: Any) -> tuple[Scenario, torch.Tensor]:
    scenario = Scenario(Example(spec, SITE, spec.name), torch.float64, grid=grid)
    valid = torch.ones(2, grid.tokens, dtype=torch.bool)
    valid[0, invalid] = False
    scenario.key_valid = valid
    return scenario, valid


@pytest.mark.parametrize("invalid", [slice(8, 24), slice(0, 9), slice(37, 60)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_whole_blocks_that_are_not_valid(spec: AttentionSpec, invalid: slice) -> None:
    scenario, valid = scenario_of(spec, SITE.grid, invalid)
    oracle = getattr(importlib.import_module(f"tests.oracles.{spec.name}"), spec.name)
    with torch.no_grad():
        for name, got, expected in pair_up(scenario.run(), oracle(scenario.case())):
            assert_close(name, got[valid], expected[valid], 1e-10)
            assert bool(got.isfinite().all())
            assert error_ratio(scenario.run(key_valid=None)[valid], got[valid]) > 1e-6


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_valid_token_at_all(spec: AttentionSpec) -> None:
    """One sample has none: its answer and every gradient are finite, and the other sample does not notice."""
    scenario, valid = scenario_of(spec, SITE.grid, slice(None))
    x = scenario.x.requires_grad_()
    y = scenario.run(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert bool(y.isfinite().all())
    assert bool(x.grad.isfinite().all())
    with torch.no_grad():
        alone = scenario.run(scenario.x[1:], key_valid=valid[1:], timestep=scenario.timestep[1:])  # type: ignore[index]
    assert_close("the other sample", y[1:].detach(), alone, 1e-10)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 3), (1, 1, 4), (1, 1, 5), (4, 1, 1), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_smallest_sizes(spec: AttentionSpec, grid: tuple[int, int, int]) -> None:
    """One token, less than a block, one block, one token more."""
    scenario = Scenario(Example(spec, SITE.at(grid=Grid(*grid)), spec.name), torch.float64)
    oracle = getattr(importlib.import_module(f"tests.oracles.{spec.name}"), spec.name)
    with torch.no_grad():
        assert_close("output", scenario.run(), oracle(scenario.case()), 1e-10)
