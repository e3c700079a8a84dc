"""Correctness gates: no speed is reported for a block that computes something else.

`against_oracle` runs the contract's main comparison, small and in fp64 loops; `against_reference_kernel` compares the block at the
measured size and dtype with itself on the plain softmax kernel; `examples_against_oracle` and `examples_as_priced` take the small
sites that an attention offers as its examples. They return the error ratio, or what they counted, and raise AssertionError.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ultrazoo import kernels, registry
from ultrazoo.attention.standalone import Standalone
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import TOLERANCES, error_ratio, null_answers
from ultrazoo.testing.accounting import Accounting
from ultrazoo.testing.scenario import Example, Scenario, examples_of, pair_up

SMALL = Site(dim=24, heads=3, head_dim=8, grid=Grid(2, 9, 11), rope=Rope(axes=(4, 2, 2)), qk_norm=True)


def against_oracle(name: str, *, layer: int = 0, layers: int = 1, **options: Any) -> float:
    """Error ratio of a small block in fp32 against its oracle in fp64, random weights, batch 2, ragged sizes."""
    spec, found = parse_part("attention", {"name": name, **options})
    assert spec is not None, found
    scenario = Scenario(Example(spec, SMALL.at(layer=layer, layers=layers), f"bench {name}"))
    oracle = getattr(importlib.import_module(f"tests.oracles.{name}"), name)
    with torch.no_grad():
        got, reference = scenario.run(), oracle(scenario.case())
    measured, allowed = error_ratio(got, reference), TOLERANCES[torch.float32].output
    assert measured <= allowed, f"{name}: error ratio {measured:.3g} against the oracle exceeds {allowed:.3g}"
    for wrong, answer in null_answers(reference, scenario.x.double()).items():
        assert error_ratio(answer, reference) > 3 * allowed, f"the comparison accepts {wrong}"
    return measured


def examples_against_oracle(name: str) -> float:
    """Largest error ratio of the attention's own examples in fp32 against its oracle in fp64, extra tokens included."""
    oracle = getattr(importlib.import_module(f"tests.oracles.{name}"), name)
    found, allowed = [], TOLERANCES[torch.float32].output
    for example in examples_of(registry.find("attention", name)):
        scenario = Scenario(example, extra=bool(example.site.extra))
        with torch.no_grad():
            pairs = pair_up(scenario.run(), oracle(scenario.case()))
        for which, got, reference in pairs:
            measured = error_ratio(got, reference)
            assert measured <= allowed, (
                f"{name}, {example.label}, {which}: error ratio {measured:.3g} over {allowed:.3g}"
            )
            assert error_ratio(torch.zeros_like(reference), reference) > 3 * allowed
            found.append(measured)
    return max(found)


def examples_as_priced(name: str) -> int:
    """How many of the attention's examples run as many query-key pairs through the kernel door as their plan says."""
    examples = examples_of(registry.find("attention", name))
    assert examples, f"{name} offers no examples"
    for example in examples:
        scenario = Scenario(example, extra=bool(example.site.extra))
        with torch.no_grad(), kernels.record() as runs:
            scenario.run()
        counted, traits = sum(run.pairs for run in runs), example.expanded.traits()
        assert runs or not traits.softmax, f"{name} used no kernel"
        cost = example.expanded.cost(scenario.site)
        Accounting.check_pairs(counted, 2 * scenario.site.heads, cost, traits, scenario.grid)
    return len(examples)


def against_reference_kernel(block: Standalone, x: Tensor, grid: Sequence[int], timestep: Tensor | None) -> float:
    """Error ratio of the block's answer against the same block with every softmax written out (kernel ``math``)."""
    got = block(x, grid, timestep)
    spec = dataclasses.replace(block.attention.spec, kernel="math")
    plain = Standalone(spec, block.site, host=block.host)
    plain.attention.to(x).load_state_dict(block.attention.state_dict())
    with kernels.record() as runs:
        reference = plain(x, grid, timestep)
    assert {run.kernel for run in runs} == {"math"}, "the reference did not run on the plain kernel"
    measured, allowed = error_ratio(got, reference), TOLERANCES[x.dtype].output
    assert measured <= allowed, f"error ratio {measured:.3g} against the plain kernel exceeds {allowed:.3g}"
    assert error_ratio(torch.zeros_like(reference), reference) > 3 * allowed
    return measured
