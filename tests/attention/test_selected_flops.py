"""Designs that choose blocks cost what their plan says, where every choice is of equal size: counted by torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrazoo.attention.pisa import PisaSpec
from ultrazoo.attention.sla2 import Sla2Spec
from ultrazoo.attention.sol import SolSpec
from ultrazoo.attention.sparse_linear import SparseLinearSpec
from ultrazoo.attention.subblock import SubblockSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Site
from ultrazoo.testing.scenario import Example, Scenario

SITE = Site(dim=32, heads=2, head_dim=16, grid=Grid(1, 32, 64))


@pytest.mark.parametrize(
    "spec",
    [
        SolSpec(tau=None),
        SubblockSpec(),
        PisaSpec(),
        PisaSpec(density=0.5, score="variance", order=0),
        SparseLinearSpec(),
        SparseLinearSpec(form="paper"),
        Sla2Spec(),
        Sla2Spec(router="soft"),
    ],
    ids=lambda spec: spec.name,
)
def test_flops_are_those_of_the_plan(spec: AttentionSpec) -> None:
    scenario = Scenario(Example(spec, SITE, spec.name), batch=1, peak=1.0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scenario.run()
    assert counter.get_total_flops() == pytest.approx(spec.cost(SITE).flops, rel=2e-3)
