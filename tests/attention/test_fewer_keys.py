"""Compressed keys and divided attention on hosts and in compositions they were not written for."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.contract.test_hosts import FusedHost
from tests.oracles.by_head import by_head
from tests.oracles.divided import divided
from tests.oracles.kv_compress import kv_compress
from tests.oracles.spatial_reduction import spatial_reduction
from ultrazoo.attention import grouped
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.divided import DividedSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.kv_compress import KvCompressSpec
from ultrazoo.attention.spatial_reduction import SpatialReductionSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import error_ratio
from ultrazoo.testing.scenario import Example, Scenario

ORACLES: dict[str, Any] = {"kv_compress": kv_compress, "spatial_reduction": spatial_reduction, "divided": divided}
SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(2, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
LARGE = Site(
    dim=1536, heads=12, head_dim=128, layers=30, grid=Grid(21, 136, 240), rope=Rope((44, 42, 42)), qk_norm=True
)
SPECS: list[AttentionSpec] = [
    *(KvCompressSpec(mode=mode) for mode in ("conv", "uniform", "average", "uniform_every")),
    *(SpatialReductionSpec(), SpatialReductionSpec(mode="pool", size=3), DividedSpec()),
]
NAMES = [f"{spec.name}-{getattr(spec, 'mode', '')}" for spec in SPECS]
EXACT = 1e-10


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_a_fused_host_with_norms_per_head(spec: AttentionSpec, pairing: Any) -> None:
    site = SITE.at(rope=replace(SITE.rope, pairing=pairing))
    one = Scenario(Example(spec, site, "fused"), torch.float64, extra=True)
    host = FusedHost(one.site, one.runner.host)
    one.runner.host = host
    with torch.no_grad():
        got, expected = one.run(), ORACLES[spec.name](replace(one.case(), host=host.reference()))
    for ours, theirs in zip(got, expected, strict=True):
        assert error_ratio(ours, theirs) < EXACT


@pytest.mark.parametrize("spec", SPECS[:-1], ids=NAMES[:-1])
def test_as_a_head_group_s_attention(spec: AttentionSpec) -> None:
    groups = ByHeadSpec(groups={"0,2": spec, "1": FullSpec()})
    one = Scenario(Example(groups, SITE, "groups"), torch.float64, extra=True)
    with torch.no_grad():
        got, expected = one.run(), by_head(one.case())
    for ours, theirs in zip(got, expected, strict=True):
        assert error_ratio(ours, theirs) < EXACT


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_slabs_change_nothing(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Scenario(Example(spec, SITE, "slabs"), torch.float64, extra=True, key_valid=True)
    with torch.no_grad():
        whole = one.run()
        monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", 1)
        pieces = one.run()
    learning = one.run()
    for first, second, third in zip(whole, pieces, learning, strict=True):
        assert error_ratio(second, first) < EXACT
        assert error_ratio(third, first) < EXACT


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_reach_is_the_union_of_rows(spec: AttentionSpec) -> None:
    sets = np.random.default_rng(0).random((4, SITE.tokens)) < 0.05
    sets[3] = False
    rows = spec.visible(SITE)[0]
    union = np.stack([rows[one].any(axis=0) for one in sets])
    found = spec.reach(SITE, sets)
    assert found is not None
    assert np.array_equal(found, union)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_plans_at_4k_take_no_time_and_no_memory(spec: AttentionSpec) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    costs = [spec.cost(LARGE.at(layer=layer)) for layer in range(LARGE.layers)]
    problems = [spec.problems(LARGE.at(layer=layer)) for layer in range(LARGE.layers)]
    seen = spec.visible(LARGE, [0, 1, LARGE.tokens - 1])
    elapsed, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problems == [[]] * LARGE.layers
    assert all(cost.pairs > 0 for cost in costs)
    assert seen.shape == (1, 3, LARGE.tokens)
    assert elapsed < 3
    assert peak < 200e6
