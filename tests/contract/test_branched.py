"""Branched attention over its whole space of options: random designs against the oracle, in both of its forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.oracles.branched import branched
from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.contract import export_form
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, contract_suite, dense, error_ratio, null_answers
from ultrazoo.testing.scenario import Example, Scenario, pair_up

EXACT = 1e-10
# the exportable form makes interpolation weights in fp32
EXPORTED = 1e-6


def spec_of(node: dict[str, Any]) -> AttentionSpec:
    spec, problems = parse_part("attention", {"name": "branched", **node})
    assert problems == [], node
    assert isinstance(spec, AttentionSpec)
    return spec


def site_of(grid: tuple[int, int, int], **changes: Any) -> Site:
    rope = Rope(axes=(2, 4, 4), base=50.0, trained=Grid(2, 3, 4))
    site = Site(dim=6, heads=2, head_dim=10, grid=Grid(*grid), rope=rope, qk_norm=True, layer=1, layers=2)
    return site.at(**changes)


def assert_equals_oracle(spec: AttentionSpec, site: Site, **options: Any) -> Scenario:
    """Both forms of the module against the oracle, fp64, with the null answers refused."""
    scenario = Scenario(Example(spec, site, "design"), torch.float64, **options)
    with torch.no_grad():
        expected = branched(scenario.case())
        for name, got, reference in pair_up(scenario.run(), expected):
            assert_close(name, got, reference, EXACT)
            for wrong, answer in null_answers(reference).items():
                assert error_ratio(answer, reference) > 1e3 * EXACT, wrong
        traits = spec.traits()
        if "pt2" in traits.export and all(n >= low for n, low in zip(site.grid, traits.min_grid, strict=True)):
            with export_form(scenario.runner, "pt2"):
                for name, got, reference in pair_up(scenario.run(), expected):
                    assert_close(f"{name}, exportable form", got, reference, EXPORTED)
    return scenario


small = st.integers(1, 3)
counts = st.one_of(small, st.tuples(small, small).map(list), st.tuples(st.integers(1, 2), small, small).map(list))
ragged = st.sampled_from(["exact", "exact", "resize"])
layouts = st.one_of(
    st.just({"name": "whole"}),
    st.fixed_dictionaries({"name": st.just("windows"), "counts": counts, "ragged": ragged}),
    st.fixed_dictionaries({"name": st.just("windows"), "size": counts, "ragged": ragged}),
    st.fixed_dictionaries({"name": st.just("strided"), "counts": counts}),
)
shifts = st.sampled_from([{"name": "none"}, {"name": "roll"}, {"name": "repartition"}])
compressors = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["avg_pool", "stride", "depthwise_conv"]),
            "factor": counts,
            "of": st.sampled_from(["both", "both", "keys"]),
            "lift": st.sampled_from([None, "nearest", "bilinear", "bilinear_conv3d"]),
            "ragged": ragged,
        }
    ),
)
adapts = st.one_of(
    st.just({"name": "shared"}),
    st.fixed_dictionaries(
        {
            "name": st.just("lora"),
            "rank": st.just(2),
            "bias": st.booleans(),
            "key_from": st.sampled_from(["key", "query"]),
        }
    ),
    st.just({"name": "own"}),
)
coords = st.fixed_dictionaries(
    {
        "origin": st.sampled_from(["grid", "window"]),
        "cell": st.sampled_from(["index", "centre"]),
        "rule": st.sampled_from(["none", "none", "interpolate", "ntk", "yarn"]),
    }
)
branches = st.fixed_dictionaries(
    {"layout": layouts, "shift": shifts, "compress": compressors, "adapt": adapts, "coords": coords}
)
fuses = st.sampled_from(
    [
        {"name": "weights"},
        {"name": "weights", "weights": {"a": 0.25, "b": 1.5}},
        {"name": "weights", "learned": True},
        {"name": "time_gate", "order": ["a", "b"], "per": "channel"},
        {"name": "time_gate", "order": ["b", "a"], "per": "head"},
        {"name": "time_gate", "order": ["a", "b"], "per": "scalar"},
        {"name": "token_gate", "per": "channel", "act": "softmax"},
        {"name": "token_gate", "per": "head", "act": "sigmoid"},
        {"name": "token_gate", "per": "scalar", "act": "none"},
        {"name": "lse"},
    ]
)
grids = st.tuples(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    a=branches, b=branches, fuse=fuses, grid=grids, layer=st.integers(0, 1), extra=st.booleans(), halves=st.booleans()
)
def test_random_designs_have_problems_or_equal_the_oracle(
    a: dict[str, Any],
    b: dict[str, Any],
    fuse: dict[str, Any],
    grid: tuple[int, int, int],
    layer: int,
    extra: bool,
    halves: bool,
) -> None:
    """Never a third thing: what `problems` lets through computes what the formula says."""
    spec, found = parse_part("attention", {"name": "branched", "branches": {"a": a, "b": b}, "fuse": fuse})
    assume(not found)
    site = site_of(grid, layer=layer)
    assert site.rope is not None
    site = site.at(rope=replace(site.rope, pairing="halves" if halves else "interleaved"))
    assert isinstance(spec, AttentionSpec)
    problems = spec.problems(site)
    assume(not problems)
    assert_equals_oracle(spec, site, extra=extra)


@pytest.mark.parametrize(
    "layout",
    [
        {"name": "whole"},
        {"name": "windows", "counts": 1},
        {"name": "windows", "size": [3, 5, 7]},
        {"name": "windows", "size": [9, 9, 9]},
        {"name": "strided", "counts": [1, 1, 1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("shift", ["none", "roll"])
def test_a_window_as_large_as_the_grid_is_full_attention(layout: dict[str, Any], shift: str) -> None:
    shifted = {} if layout["name"] in ("whole", "strided") else {"shift": {"name": shift}}
    spec = spec_of({"branches": {"only": {"layout": layout, **shifted}}})
    site = site_of((3, 5, 7))
    assert spec.problems(site) == []
    scenario = Scenario(Example(spec, site, "window"), torch.float64, extra=True)
    with torch.no_grad():
        for name, got, reference in pair_up(scenario.run(), dense(scenario.case())):
            assert_close(name, got, reference, EXACT)


PAIR = {"a": {"layout": {"name": "windows", "counts": 2}}, "b": {"layout": {"name": "strided", "counts": [1, 3, 2]}}}
DESIGNS = {
    "t3 with learned weights": {"branches": PAIR, "fuse": {"name": "weights", "learned": True}},
    "swin by size": {
        "branches": {"a": {"layout": {"name": "windows", "size": [2, 2, 3]}, "shift": {"name": "roll"}}},
    },
    "swin by count, joined with coarse keys": {
        "branches": {
            "a": {"layout": {"name": "windows", "counts": 2}, "shift": {"name": "roll"}},
            "b": {"compress": {"name": "stride", "factor": 2, "of": "keys"}},
        },
        "fuse": {"name": "lse"},
    },
    "stretched rope": {
        "branches": {
            "a": {"coords": {"rule": "yarn"}},
            "b": {"compress": {"name": "avg_pool", "factor": 2, "of": "keys"}, "coords": {"rule": "ntk"}},
        },
        "fuse": {"name": "token_gate", "per": "head", "act": "softmax"},
    },
    "cells in time": {
        "branches": {
            "a": {
                "compress": {"name": "depthwise_conv", "factor": [2, 2, 3]},
                "adapt": {"name": "own"},
                "coords": {"origin": "window", "cell": "centre"},
                "layout": {"name": "windows", "counts": [1, 2, 1]},
                "shift": {"name": "repartition"},
            },
            "b": {"layout": {"name": "windows", "size": [1, 3, 3]}},
        },
        "fuse": {"name": "time_gate", "order": ["a", "b"], "per": "scalar"},
    },
}


@pytest.mark.proof
@pytest.mark.parametrize("name", list(DESIGNS))
def test_designs_export_with_dynamic_sizes(name: str) -> None:
    """Beyond what `examples()` hold: every rule of an axis, fusion and rope through `torch.export`."""
    spec = spec_of(DESIGNS[name])
    example = Example(spec, site_of((3, 5, 7)), name)
    suite = contract_suite(BranchedSpec, oracle=branched)()
    assert "pt2" in spec.traits().export
    suite.test_exports_with_dynamic_sizes(example)


@pytest.mark.proof
@pytest.mark.parametrize("name", list(DESIGNS))
def test_designs_keep_the_whole_contract(name: str) -> None:
    """The parts of the contract that random designs leave out: gradients, influence, counts."""
    example = Example(spec_of(DESIGNS[name]), site_of((3, 5, 7)), name)
    suite = contract_suite(BranchedSpec, oracle=branched)()
    suite.test_output_equals_the_oracle(example, torch.float32)
    suite.test_gradients_equal_the_oracle_s(example)
    suite.test_only_visible_tokens_matter(example)
    suite.test_pairs_equal_what_reaches_the_kernel(example)
    suite.test_flops_are_counted(example)
    suite.test_parameters_are_counted(example)
    suite.test_invalid_tokens_are_never_keys(example)
    suite.test_two_forwards_before_a_backward_under_checkpointing(example)
    assert example.expanded.problems(example.site) == []
