"""Sol-Attn: densities of its threshold, sinks, switches that make it exact, sizes and inputs at the edges."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

import ultrazoo
from tests.attention.raw import GivenHost, block_of, given, noise, softmax
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.contract import Call
from ultrazoo.attention.sol import SolSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.spec import Segment, Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12


def site(*grid: int) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid))


def near_share(spec: SolSpec, tokens: int, heads: int = 2, dim: int = 8, seed: int = 0) -> float:
    """The share of all pairs that are exact, on Gaussian queries and keys."""
    q, k, v = (noise(seed + i, 1, tokens, heads, dim).float() for i in range(3))
    module = block_of(spec, heads, dim, tokens).float()
    with torch.no_grad(), record() as runs:
        module(torch.cat([z.flatten(2) for z in (q, k, v)], -1), GivenHost(heads), Call(grid=(1, 1, tokens)))
    return runs[0].pairs / (heads * tokens**2)


@pytest.mark.parametrize("moments", ["diag", "exact"])
@pytest.mark.parametrize(("tau", "published"), [(0.8, 0.21), (1.0, 0.16), (1.3, 0.097), (1.5, 0.067), (2.0, 0.023)])
def test_density_of_gaussian_scores(tau: float, published: float, moments: str) -> None:
    """21, 16, 9.7, 6.7 and 2.3 % at tau 0.8, 1, 1.3, 1.5 and 2, and the band of three blocks."""
    blocks = 256
    spec = SolSpec(tau=tau, moments=moments, block=4)  # type: ignore[arg-type]
    share, band = 1 - NormalDist().cdf(tau), 3 / blocks
    assert abs(share - published) < 0.005
    measured = near_share(spec, 4 * blocks)
    assert abs(measured - (band + (1 - band) * share)) < 0.008
    cost = spec.cost(site(1, 1, 4 * blocks))
    far = 4 * blocks * blocks
    assert abs((cost.pairs - far) / (4 * blocks) ** 2 - (band + (1 - band) * share)) < 1e-3


def test_cost_at_the_published_size() -> None:
    """2 N² D (rho + 1/64) multiply-adds: block means cost a 64th of dense."""
    at = Site(dim=5120, heads=40, head_dim=128, grid=Grid(21, 45, 80))
    cost = SolSpec(tau=1.5).cost(at)
    rho = 1 - NormalDist().cdf(1.5)
    assert cost.pairs / at.tokens**2 == pytest.approx(rho + 3 / 1182 * (1 - rho) + 1 / 64, rel=1e-2)
    assert cost.pairs_min is not None
    assert cost.pairs_min < cost.pairs


@pytest.mark.parametrize("tau", [None, float("-inf")])
@pytest.mark.parametrize("order", ["raster", "morton"])
def test_without_a_threshold_it_is_full_attention(tau: float | None, order: str) -> None:
    q, k, v = (noise(i, 2, 3 * 5 * 7, 2, 8, scale=2.0) for i in range(3))
    spec = SolSpec(tau=tau, block=4, order=order)  # type: ignore[arg-type]
    assert_close("dense", given(spec, q, k, v, grid=(3, 5, 7)), softmax(q, k, v), EXACT)
    assert spec.traits().exact_at_init
    assert error_ratio(given(SolSpec(block=4), q, k, v, grid=(3, 5, 7)), softmax(q, k, v)) > 0.01


@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 127, 128])
def test_two_blocks_are_full_attention(tokens: int) -> None:
    """The band of neighbours covers up to 128 tokens at the published block."""
    q, k, v = (noise(tokens + i, 1, tokens, 2, 8, scale=2.0) for i in range(3))
    assert_close("dense", given(SolSpec(), q, k, v), softmax(q, k, v), EXACT)


@pytest.mark.parametrize("tau", [0.0, 1.0, float("inf")])
@pytest.mark.parametrize("tokens", [129, 193, 200])
def test_every_key_counts_once(tau: float, tokens: int) -> None:
    """With equal values everywhere the answer is that value: near and far keys share one normaliser."""
    q, k = (noise(tokens + i, 2, tokens, 2, 8, scale=2.0) for i in range(2))
    v = noise(9, 1, 1, 2, 8).expand(2, tokens, -1, -1)
    assert_close("values", given(SolSpec(tau=tau, block=16), q, k, v), v, EXACT)


def test_a_higher_threshold_is_further_from_full_attention() -> None:
    q, k, v = (noise(i, 1, 512, 4, 16, scale=1.5) for i in range(3))
    full = softmax(q, k, v)
    errors = [error_ratio(given(SolSpec(tau=t, block=8), q, k, v), full) for t in (-1.0, 0.0, 1.0, 2.0)]
    assert errors == sorted(errors)
    assert errors[0] < 0.5 * errors[-1]


def test_block_means_beat_dropping_at_an_equal_choice() -> None:
    q, k, v = (noise(i, 1, 512, 4, 16) for i in range(3))
    expanded = SolSpec(block=8).expand(site(1, 1, 512))
    assert isinstance(expanded, BlockSparseSpec)
    dropped = BlockSparseSpec(order=expanded.order, selector=expanded.selector)
    full = softmax(q, k, v)
    assert error_ratio(given(SolSpec(block=8), q, k, v), full) < 0.8 * error_ratio(given(dropped, q, k, v), full)


def test_equal_keys_are_no_outliers() -> None:
    """Zero variance: nothing lies above the threshold, the band is left, and nothing is NaN."""
    q, v = noise(0, 1, 64, 1, 8), noise(1, 1, 64, 1, 8)
    k = noise(2, 1, 1, 1, 8).expand(1, 64, -1, -1)
    y = given(SolSpec(block=8), q, k, v)
    # means of equal keys lose nothing
    assert_close("dense", y, softmax(q, k, v), EXACT)


def test_a_sink_is_rounded_outward_and_seen_by_all() -> None:
    at = site(1, 1, 64)
    expanded = SolSpec(tau=float("inf"), block=8, band=0, sink=(15, 2)).expand(at)
    assert isinstance(expanded, BlockSparseSpec)
    chosen = expanded.selector.of[2].map(expanded.place(at), at, 0, 8)  # type: ignore[attr-defined]
    assert chosen[0].tolist() == [[False, True, True, False, False, False, False, False]] * 8
    q, k, v = (noise(i, 1, 64, 1, 8, scale=2.0) for i in range(3))
    everything = SolSpec(tau=float("inf"), block=8, sink=(0, 64))
    assert_close("a sink of everything", given(everything, q, k, v), softmax(q, k, v), EXACT)


def test_a_sink_along_a_curve_holds_the_same_tokens() -> None:
    at = site(2, 4, 4)
    expanded = SolSpec(block=1, order="morton", sink=(5, 3)).expand(at)
    assert isinstance(expanded, BlockSparseSpec)
    place = expanded.place(at)
    chosen = expanded.selector.of[2].map(place, at, 0, 1)[0, 0]  # type: ignore[attr-defined]
    assert place.order is not None
    assert sorted(place.order[chosen].tolist()) == [5, 6, 7]


@pytest.mark.parametrize("sink", [(60, 5), (64, 1), (0, 0), (0, 65)])
def test_a_sink_off_the_grid_is_refused(sink: tuple[int, int]) -> None:
    (problem,) = SolSpec(sink=sink).problems(site(1, 1, 64))
    assert problem.path == "sink"
    assert "64" in str(problem.fix)


def test_prefix_tokens_are_exact_for_every_query() -> None:
    """Extra tokens that all see are a sink: with everything else at a mean, their share of the softmax is exact."""
    at = site(1, 1, 64).at(extra=(Segment("text", 5),))
    assert SolSpec().expand(at).problems(at) == []
    compete = site(1, 1, 64).at(extra=(Segment("reference", 5, keys="compete"),))
    (problem,) = SolSpec().expand(compete).problems(compete)
    assert problem.path == "selector"


@pytest.mark.parametrize(
    ("options", "path"), [({"block": 0}, "block"), ({"band": -1}, "band"), ({"sink": [1]}, "sink")], ids=str
)
def test_bad_options_name_their_path(options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError, match=path):
        ultrazoo.create_attention("sol", dim=16, heads=2, **options)


def test_diag_and_exact_moments_differ_where_channels_correlate() -> None:
    """Channels that move together: the variance of the sum is not the sum of variances."""
    direction = noise(5, 1, 1, 1, 1).expand(1, 1, 1, 8) / math.sqrt(8)
    k = noise(1, 1, 256, 1, 1) * direction + 0.01 * noise(2, 1, 256, 1, 8)
    q, v = direction + 0.01 * noise(3, 1, 256, 1, 8), noise(4, 1, 256, 1, 8)
    diag, exact = (given(SolSpec(tau=0.5, block=4, moments=m), q, k, v) for m in ("diag", "exact"))  # type: ignore[arg-type]
    assert error_ratio(diag, exact) > 1e-4
