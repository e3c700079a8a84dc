"""What a spec says about itself without torch: problems, parameters, pairs and FLOPs, held against what runs."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..grid import Grid
from ..kernels import record
from ..spec import CONTRACT, Cost, Traits
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
            traits = example.expanded.traits()
            assert runs or not traits.softmax, "no call went through the kernel door"
            counted = sum(run.pairs for run in runs)
            # kernels that follow lists of blocks are recorded with the pairs of real tokens
            visited = cost.pairs if any(run.blocks for run in runs) else cost.visited
            self.check_pairs(counted, 2 * scenario.site.heads, cost, traits, grid, visited)
            if not traits.softmax:
                continue
            # pairs are an average over heads, which need not be whole where heads differ
            assert abs(cost.attention_flops - 4 * cost.pairs * scenario.site.inner) <= 4 * scenario.site.inner
            assert cost.visited >= cost.pairs
            if cost.branches:
                assert sum(branch.attention_flops for branch in cost.branches) == cost.attention_flops

    @staticmethod
    def check_pairs(counted: int, times: int, cost: Cost, traits: Traits, grid: Grid, visited: int) -> None:
        """`counted` pairs over batch and heads are `visited` ones, or lie within the bounds of the cost where the data decides."""
        low = high = visited
        if traits.selects:
            assert cost.pairs_min is not None, "the data decides: say pairs_min"
            assert cost.pairs_max is not None, "the data decides: say pairs_max"
            assert cost.pairs_min <= cost.pairs <= cost.pairs_max
            low, high = cost.pairs_min, cost.pairs_max
        slack = times / 2
        assert times * low - slack <= counted <= times * high + slack, (
            f"at {grid}: {counted / times}, not {low}..{high}"
        )

    def test_flops_are_counted(self, example: Example) -> None:
        """Matmul, convolution and attention as torch counts them in one forward, 2 per multiply-add."""
        scenario = Scenario(example, batch=1, extra=bool(example.site.extra))
        cost = example.expanded.cost(scenario.site)
        # with gradients on: without, convolutions run tap by tap and skip those that fall on padding
        with FlopCounterMode(display=False) as counter, record() as runs:
            scenario.run()
        declared = cost.flops + 4 * (cost.visited - cost.pairs) * scenario.site.inner
        counted = counter.get_total_flops()
        if example.expanded.traits().selects or any(run.blocks for run in runs):
            # kernels that follow lists of blocks may compute padding: at least what the fewest pairs need
            least = cost.pairs if cost.pairs_min is None else cost.pairs_min
            fewest = cost.flops - 4 * (cost.pairs - least) * scenario.site.inner
            assert counted >= (1 - FLOPS_ERROR) * fewest, f"declared at least {fewest}, counted {counted}"
            return
        assert abs(declared - counted) <= FLOPS_ERROR * counted, f"declared {declared}, counted {counted}"
