"""Predicted FLOPs and parameters against torch's own counter, on meta, for every registered attention and both backbones.

The counter sees matmuls and convolutions. Compression runs as sums it does not see, and a lift's 3 x 3 x 3 convolution
skips the taps that fall outside the clip; `BranchCost.other_flops` counts both in full. So everything else must agree to
the last FLOP, and those may only be over-counted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.cost.fakes import Range, Sampler
from ultrazoo import registry
from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.contract import Extra
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.coords import CoordsSpec
from ultrazoo.attention.sliding_tile import SlidingTileSpec
from ultrazoo.attention.standalone import Standalone
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.backbones.dit import Dit, DitSpec
from ultrazoo.backbones.wan import Wan, WanSpec
from ultrazoo.cost import price
from ultrazoo.grid import Grid


def counted(module, *inputs) -> tuple[int, int]:
    """(all FLOPs, those of convolutions inside attentions) of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    lifts = 0
    for name, operations in counter.get_flop_counts().items():
        if name.endswith(".attention") or name == "Standalone.attention":
            lifts += sum(count for operation, count in operations.items() if "convolution" in str(operation))
    return counter.get_total_flops(), lifts


EXAMPLES = [
    pytest.param(name, index, id=f"{name}-{index}")
    for name in registry.names("attention")
    if "/" not in name
    for index, (spec, _) in enumerate(registry.find("attention", name).examples())
    # lists of blocks are data, which meta tensors do not have: the contract suite counts those on real ones
    if spec.traits().fullgraph
]


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_an_attention_costs_what_torch_counts(name, index):
    spec, site = registry.find("attention", name).examples()[index]
    cost = spec.expand(site).cost(site)
    with torch.device("meta"):
        module = Standalone(spec, site)
        x, time = torch.empty(1, site.tokens, site.dim), torch.empty(1)
        more = torch.empty(3, 1, site.extra_tokens, site.heads, site.head_dim)
    extra = Extra(*more, segments=site.extra) if site.extra else None
    total, lifts = counted(module, x, tuple(site.grid), time if site.has_timestep else None, extra)
    convolutions = sum(branch.other_flops for branch in cost.branches)
    # with what kernels compute beside the pairs, both averages over heads
    flops = cost.flops + 4 * (cost.visited - cost.pairs) * site.inner
    if isinstance(spec, SlidingTileSpec):
        assert abs(total - flops) <= 4 * site.inner
        return
    if isinstance(spec.expand(site), BranchedSpec | ByHeadSpec):
        assert flops - convolutions == total - lifts
        assert lifts <= convolutions
    else:
        # a depthwise convolution written out tap by tap is arithmetic that the counter does not see
        assert total in (flops, flops - convolutions)
    assert sum(parameter.numel() for parameter in module.attention.parameters()) == cost.parameters


WAN = WanSpec(dim=96, heads=4, layers=3, ffn_dim=200, text_dim=32, text_tokens=12, time_dim=32)
DIT = DitSpec(dim=48, heads=3, layers=3, classes=7)
DESIGNS = {
    "full": FullSpec(),
    "paper": UltraGenSpec(windows=4, rank=5),
    "released": UltraGenSpec(windows=2, rank=5, variant="released", full_first=1, full_last=1),
}


def inputs(spec, grid):
    latents = torch.empty(1, 16, grid.t, 2 * grid.h, 2 * grid.w)
    if isinstance(spec, WanSpec):
        return latents, torch.empty(1), torch.empty(1, 12, 32)
    size = (1, 4, 2 * grid.h, 2 * grid.w) if grid.t == 1 else (1, 4, grid.t, 2 * grid.h, 2 * grid.w)
    return torch.empty(size), torch.empty(1), torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("module", "spec", "grid"),
    [(Wan, WAN, Grid(2, 12, 24)), (Wan, WAN, Grid(3, 9, 11)), (Dit, DIT, Grid(1, 16, 12)), (Dit, DIT, Grid(3, 9, 10))],
)
def test_a_model_costs_what_torch_counts(module, spec, grid, design):
    if design != "full" and isinstance(spec, DitSpec):
        # a host without rotary embedding takes no coordinates
        branched = DESIGNS[design].expand(spec.sites(grid)[1])
        branches = {name: replace(branch, coords=CoordsSpec()) for name, branch in branched.branches.items()}
        attention = [replace(branched, branches=branches)] * 3
    else:
        attention = [DESIGNS[design]] * 3
    sites = spec.sites(grid)
    plan = price(spec, sites, [one.expand(site) for one, site in zip(attention, sites, strict=True)], grid=grid)
    with torch.device("meta"):
        model = module(spec, attention, grid)
        total, lifts = counted(model, *inputs(spec, grid))
    convolutions = sum(branch.other_flops for layer in plan.layers for branch in layer.branches)
    assert plan.totals.flops - convolutions == total - lifts
    assert lifts <= convolutions
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.totals.parameters


def test_alternatives_for_other_steps_are_parameters_of_the_plan():
    grid = Grid(2, 12, 24)
    sites = WAN.sites(grid)
    sparse, dense = DESIGNS["paper"], DESIGNS["full"]
    steps = [Range(0, 3, {0: dense, 1: dense}), Range(7, 9, {2: sparse})]
    expanded = [Range(one.first, one.last, {i: s.expand(sites[i]) for i, s in one.layers.items()}) for one in steps]
    attention = [sparse, sparse, dense]
    plan = price(
        WAN, sites, [s.expand(site) for s, site in zip(attention, sites, strict=True)], grid=grid, steps=expanded,
        sampling=Sampler(10),
    )  # fmt: skip
    with torch.device("meta"):
        model = Wan(WAN, attention, grid, steps)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.totals.parameters
    with torch.device("meta"):
        total = 0
        for step in range(10):
            model.select(step, 10)
            flops, lifts = counted(model, *inputs(WAN, grid))
            total += flops - lifts
    # sparse layers at each step: none, then layers 0 and 1, then all three
    runs = 4 * 0 + 3 * 2 + 3 * 3
    convolutions = sum(branch.other_flops for branch in plan.layers[0].branches)
    assert plan.clip.flops - runs * convolutions == total
