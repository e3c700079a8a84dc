"""What a spec says about itself without torch: problems, parameters, pairs and FLOPs, held against what runs."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import record
from ..spec import CONTRACT
from .base import ContractBase
from .scenario import Example, Scenario, other_grids

FLOPS_ERROR = 0.01


class Accounting(ContractBase):
    """Declared facts."""

    def test_the_spec_is_frozen_data(self, example: Example) -> None:
        spec = example.spec
        assert dataclasses.is_dataclass(spec)
        assert spec.__dataclass_params__.frozen, f"{type(spec).__name__} is not frozen"  # type: ignore[attr-defined]
        assert spec.contract == CONTRACT
        assert spec.kind == "attention"
        assert spec.name == self.spec_class.name
        assert spec == dataclasses.replace(spec)
        assert type(spec).__doc__, f"{type(spec).__name__} has no docstring"
        for field in dataclasses.fields(spec):
            assert field.metadata.get("doc"), f"option {field.name!r} is not documented"

    def test_examples_are_sites_without_problems(self, example: Example) -> None:
        assert example.expanded.problems(example.site) == []
        traits = example.expanded.traits()
        assert traits.start.kind in ("exact", "training-free", "needs tuning")

    def test_parameters_are_counted(self, example: Example) -> None:
        attention = example.spec.build(example.site)
        counted = sum(p.numel() for p in attention.parameters())
        assert example.expanded.cost(example.site).parameters == counted

    def test_pairs_equal_what_reaches_the_kernel(self, example: Example) -> None:
        """Query-key pairs per head, at the example's size and a ragged one, extra tokens of the site included."""
        for grid in (example.site.grid, *other_grids(example)[:1]):
            scenario = Scenario(example, grid=grid, batch=2, extra=bool(example.site.extra))
            cost = example.spec.expand(scenario.site).cost(scenario.site)
            with torch.no_grad(), record() as runs:
                scenario.run()
            assert runs, "no call went through the kernel door"
            counted = sum(math.prod(run.q[:-1]) * run.k[-2] for run in runs)
            heads = scenario.site.heads
            # pairs are an average over heads, which need not be whole where heads differ
            assert abs(counted - 2 * heads * cost.pairs) <= heads, (
                f"at {grid}: {counted / (2 * heads)}, not {cost.pairs}"
            )
            assert cost.attention_flops == 2 * counted * scenario.site.head_dim
            if cost.branches:
                assert sum(branch.attention_flops for branch in cost.branches) == cost.attention_flops

    def test_flops_are_counted(self, example: Example) -> None:
        """Matmul, convolution and attention as torch counts them in one forward, 2 per multiply-add."""
        scenario = Scenario(example, batch=1, extra=bool(example.site.extra))
        cost = example.expanded.cost(scenario.site)
        # with gradients on: without, convolutions run tap by tap and skip those that fall on padding
        with FlopCounterMode(display=False) as counter:
            scenario.run()
        declared, counted = cost.flops, counter.get_total_flops()
        assert abs(declared - counted) <= FLOPS_ERROR * counted, f"declared {declared}, counted {counted}"
