"""Branched attention over its whole space of options: random designs against the oracle, in both of its forms."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.oracles.branched import branched
from ultrazoo.attention.contract import export_form
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio, null_answers
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
@given(a=branches, b=branches, fuse=fuses, grid=grids, layer=st.integers(0, 1), extra=st.booleans())
def test_random_designs_have_problems_or_equal_the_oracle(
    a: dict[str, Any], b: dict[str, Any], fuse: dict[str, Any], grid: tuple[int, int, int], layer: int, extra: bool
) -> None:
    """Never a third thing: what `problems` lets through computes what the formula says."""
    spec, found = parse_part("attention", {"name": "branched", "branches": {"a": a, "b": b}, "fuse": fuse})
    assume(not found)
    site = site_of(grid, layer=layer)
    assert isinstance(spec, AttentionSpec)
    problems = spec.problems(site)
    assume(not problems)
    assert_equals_oracle(spec, site, extra=extra)
