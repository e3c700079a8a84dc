"""The invariants of block-sparse attention: what near and far add up to, what may not matter, what is counted."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.raw import given, noise, softmax
from tests.attention.sparse_options import setting
from tests.oracles.block_sparse import block_sparse, chosen_blocks
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.budgets import BudgetSpec
from ultrazoo.attention.parts.by_query import ByQuerySpec
from ultrazoo.attention.parts.far import CoarseSpec, DropSpec, FarSpec, MeanSpec
from ultrazoo.attention.parts.far_linear import LinearFarSpec
from ultrazoo.attention.parts.orders import CurveSpec, OrderSpec, RasterSpec, TilesSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import MeanStdSpec, TopKOrPSpec, TopKSpec, TopPSpec
from ultrazoo.attention.parts.selectors import AllSpec, BandSpec, SelectorSpec, SinkSpec, UnionSpec
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.spec import Rope, Segment, Site
from ultrazoo.testing import TOLERANCES, assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario, pair_up

EXACT = 1e-11


def top(share: float, **more: Any) -> PooledSpec:
    return PooledSpec(rule=TopKSpec(share=share), **more)


def compare(spec: BlockSparseSpec, site: Site, dtype: torch.dtype = torch.float64, **how: Any) -> None:
    """With the oracle, on rows of real tokens."""
    scenario = Scenario(Example(spec, site, "case"), dtype, **how)
    with torch.no_grad():
        got, expected = scenario.run(), block_sparse(scenario.case())
    for name, one, reference in pair_up(got, expected):
        real = scenario.key_valid
        if name == "extra rows":
            assert scenario.extra is not None
            real = scenario.extra.key_mask
        if real is not None:
            one, reference = one[real], reference[real]
        assert_close(f"{name} of {spec} at {site}", one, reference, TOLERANCES[dtype].output)


def drawn(seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        spec, site = setting(draw)
        dtype = draw.choice([torch.float64, torch.float64, torch.float32])
        extra, valid = bool(site.extra) and draw.random() < 0.8, draw.random() < 0.4
        # a number of blocks may be more than all where those of extra tokens are missing
        extra = extra or bool(spec.problems(site.at(extra=())))
        compare(spec, site, dtype, batch=draw.choice([1, 2]), extra=extra, key_valid=valid)


def test_random_settings_equal_the_oracle() -> None:
    drawn(range(50))


@pytest.mark.proof
@pytest.mark.parametrize("part", range(8))
def test_many_random_settings_equal_the_oracle(part: int) -> None:
    drawn(range(50 + 100 * part, 150 + 100 * part))


# --- (a) near and far in one softmax --------------------------------------------------------------------------------


def by_pseudo_keys(q: Tensor, k: Tensor, v: Tensor, block: int, share: float) -> Tensor:
    """Chosen keys as they are, every other block as its mean with log n added; q, k, v (B, N, heads, D), one sample."""
    tokens, s = q.shape[1], q.shape[-1] ** -0.5
    pieces = [list(range(i, min(i + block, tokens))) for i in range(0, tokens, block)]
    kc, vc = (torch.stack([z[0, own].mean(0) for own in pieces]) for z in (k, v))
    qc = torch.stack([q[0, own].mean(0) for own in pieces])
    count = math.ceil(share * len(pieces) - 1e-9)
    out = torch.zeros_like(q)
    for head in range(q.shape[2]):
        for i, rows in enumerate(pieces):
            ranked = sorted(range(len(pieces)), key=lambda j, i=i, h=head: (-float(qc[i, h] @ kc[j, h]), j))
            near, far = ranked[:count], ranked[count:]
            columns = [n for j in near for n in pieces[j]]
            keys = torch.cat([k[0, columns, head], kc[far, head]])
            values = torch.cat([v[0, columns, head], vc[far, head]])
            weight = torch.tensor([0.0] * len(columns) + [math.log(len(pieces[j])) for j in far], dtype=torch.float64)
            for row in rows:
                out[0, row, head] = (s * keys @ q[0, row, head] + weight).softmax(0) @ values
    return out


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [40, 41, 5])
def test_a_near_and_far_are_one_softmax_with_pseudo_keys(tokens: int, share: float) -> None:
    q, k, v = (noise(tokens + i, 1, tokens, 2, 8, scale=2.0) for i in range(3))
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=top(share), far=MeanSpec())
    expected = by_pseudo_keys(q, k, v, 8, share)
    assert_close("near and far", given(spec, q, k, v), expected, EXACT)
    if share < 1 and tokens > 8:
        assert error_ratio(given(replace(spec, far=DropSpec()), q, k, v), expected) > 1e-2


# --- (b) every key once -----------------------------------------------------------------------------------------------

SELECTORS: dict[str, SelectorSpec] = {
    "top-k": top(0.3),
    "top-p": PooledSpec(rule=TopPSpec(p=0.5)),
    "threshold": PooledSpec(rule=MeanStdSpec(tau=0.5)),
    "nothing near": PooledSpec(rule=MeanStdSpec(tau=1e6)),
    "forced": UnionSpec(of=(top(0.1), BandSpec(), SinkSpec())),
    "static": UnionSpec(of=(BandSpec(width=0), SinkSpec())),
}


@pytest.mark.parametrize("order", [RasterSpec(block=8), RasterSpec(block=(8, 5)), TilesSpec(tile=(2, 2, 3))], ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_b_near_and_far_partition_the_keys(name: str, order: OrderSpec) -> None:
    """Where the keys of a block are equal, blocks as means lose nothing: each key is there once, near or far."""
    grid = Grid(3, 5, 7)
    site = Site(dim=16, heads=2, head_dim=8, grid=grid)
    spec = BlockSparseSpec(order=order, selector=SELECTORS[name], far=MeanSpec())
    place = spec.place(site)
    which = torch.zeros(grid.tokens, dtype=torch.long)
    at = torch.arange(grid.tokens) if place.order is None else torch.as_tensor(place.order)
    which[at] = torch.arange(place.keys.count).repeat_interleave(torch.as_tensor(place.keys.sizes))
    q, v = noise(0, 1, grid.tokens, 2, 8, scale=2.0), noise(1, 1, grid.tokens, 2, 8)
    k = noise(2, 1, place.keys.count, 2, 8, scale=2.0)[:, which]
    full = softmax(q, k, v)
    assert_close("near and far", given(spec, q, k, v, grid=tuple(grid)), full, EXACT)
    apart = replace(spec, far=CoarseSpec(gate="none"))
    assert error_ratio(given(apart, q, k, v, grid=tuple(grid)), full) > 1e-2


# --- (c) what is not there does not matter ----------------------------------------------------------------------------

SETTINGS: list[tuple[OrderSpec, SelectorSpec, FarSpec]] = [
    (RasterSpec(block=8), top(0.3, runs=(2, 4), centre=True), DropSpec()),
    (
        TilesSpec(tile=(2, 2, 3)),
        PooledSpec(rule=MeanStdSpec(tau=0.3, moments="exact"), key_bias="log_norm"),
        MeanSpec(),
    ),
    (CurveSpec(block=6), PooledSpec(rule=TopPSpec(p=0.6), key_bias="log_variance"), MeanSpec(order=1)),
    (TilesSpec(tile=(1, 3, 3)), top(0.2), CoarseSpec(gate="none")),
]
SEGMENTS = (Segment("text", 5, rows="pattern", keys="compete"), Segment("text", 7, keys="always"))


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_c_what_is_not_real_changes_nothing(index: int) -> None:
    """Hidden states, extra queries, keys and values that are not real may hold anything; whole blocks may be missing."""
    order, selector, far = SETTINGS[index]
    site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), extra=SEGMENTS, qk_norm=True)
    spec = BlockSparseSpec(order=order, selector=selector, far=far)
    scenario = Scenario(Example(spec, site, "pad"), torch.float64, extra=True, key_valid=True)
    valid, extra = scenario.key_valid, scenario.extra
    assert valid is not None
    assert extra is not None
    assert extra.key_mask is not None
    valid[0, :37] = False
    extra.key_mask[1, :5] = False
    unreal = ~extra.key_mask[..., None, None]
    other = replace(extra, q=extra.q - 5.0 * unreal, k=extra.k + 7.0 * unreal, v=extra.v - 9.0 * unreal)
    with torch.no_grad():
        y, y_extra = scenario.run()
        moved, moved_extra = scenario.run(scenario.x + 6.0 * ~valid[..., None], extra=other)
        seen, _ = scenario.run(scenario.x + 6.0 * valid[..., None])
    assert torch.equal(moved[valid], y[valid])
    assert torch.equal(moved_extra[extra.key_mask], y_extra[extra.key_mask])
    assert error_ratio(seen[valid], y[valid]) > 1e-2
    expected, expected_extra = block_sparse(scenario.case())
    assert_close("valid rows", y[valid], expected[valid], EXACT)
    assert_close("extra rows", y_extra[extra.key_mask], expected_extra[extra.key_mask], EXACT)


SKIPS = LinearFarSpec(keys="complement", skip=0.4)


@pytest.mark.parametrize(
    ("selector", "far"),
    [
        (PooledSpec(rule=TopPSpec(p=0.7)), MeanSpec()),
        (PooledSpec(rule=TopPSpec(p=0.2, floor=0.4)), MeanSpec()),
        (PooledSpec(rule=TopKSpec(share=0.4)), MeanSpec()),
        (PooledSpec(rule=TopKSpec(share=0.3, competing="added")), MeanSpec()),
        (PooledSpec(rule=TopKSpec(share=0.3)), SKIPS),
        (PooledSpec(rule=TopKSpec(share=0.4, soft=0.2)), LinearFarSpec(keys="complement")),
        (PooledSpec(rule=TopKOrPSpec(share=0.4, p=0.1)), MeanSpec()),
        (PooledSpec(rule=MeanStdSpec(tau=0.3)), MeanSpec()),
        (BudgetSpec(of=PooledSpec(), heads=(0.2, 0.4, 0.6)), MeanSpec()),
    ],
)
def test_c_extra_tokens_of_different_number_within_a_batch(selector: Any, far: Any) -> None:
    """A shorter text is a longer one with a mask: each sample equals itself alone with its own number of tokens."""
    rows = (Segment("text", 9, rows="pattern", keys="compete"),)
    site = Site(dim=20, heads=3, head_dim=8, grid=Grid(2, 3, 5), extra=rows)
    spec = BlockSparseSpec(order=RasterSpec(block=4), selector=selector, far=far)
    scenario = Scenario(Example(spec, site, "lengths"), torch.float64, batch=3, extra=True)
    extra = scenario.extra
    assert extra is not None
    lengths = [9, 4, 1]
    extra.key_mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        y, y_extra = scenario.run()
        for i, length in enumerate(lengths):
            one = slice(i, i + 1)
            own = {name: getattr(extra, name)[one, :length] for name in "qkv"}
            alone = replace(extra, **own, key_mask=None, segments=(replace(rows[0], length=length),))
            found, found_extra = scenario.run(scenario.x[one], timestep=scenario.timestep[one], extra=alone)  # type: ignore[index]
            assert_close(f"sample {i}", y[one], found, EXACT)
            assert_close(f"text of sample {i}", y_extra[one, :length], found_extra, EXACT)


# --- (d) what is visited ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "share", "kept"), [(10, 0.1, 1), (30, 0.1, 3), (7, 0.5, 4), (4, 0.01, 1), (9, 1.0, 9)]
)
def test_d_density_is_the_share_of_blocks(blocks: int, share: float, kept: int) -> None:
    site = Site(dim=8, heads=1, head_dim=8, grid=Grid(1, blocks, 16))
    spec = BlockSparseSpec(order=RasterSpec(block=16), selector=top(share))
    cost = spec.cost(site)
    assert cost.pairs == cost.pairs_min == cost.pairs_max == site.tokens * 16 * kept
    q, k, v = (noise(i, 1, site.tokens, 1, 8) for i in range(3))
    with record() as runs:
        given(spec, q, k, v)
    assert [run.pairs for run in runs] == [cost.pairs]


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_d_pairs_are_those_of_the_oracle_s_blocks(index: int) -> None:
    """Tokens times tokens of the chosen blocks, dense rows and pseudo-keys beside them, ragged blocks and all."""
    order, selector, far = SETTINGS[index]
    site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), extra=SEGMENTS)
    spec = BlockSparseSpec(order=order, selector=selector, far=far)
    scenario = Scenario(Example(spec, site, "pairs"), torch.float64, extra=True)
    with torch.no_grad(), record() as runs:
        scenario.run()
    where, chosen = chosen_blocks(scenario.case())
    queries, keys = (torch.tensor([len(b) for b in blocks]).double() for blocks in (where.queries, where.keys))
    near = int((chosen.double() @ keys * queries).sum())
    dense = 2 * 3 * 7 * (site.tokens + site.extra_tokens)
    beside = {"drop": 0, "mean": int(queries.sum()) * where.selectable, "coarse": len(queries) * len(keys)}
    assert sum(run.pairs for run in runs) == near + dense + 2 * 3 * beside[far.name]


def test_d_a_threshold_keeps_the_tail_of_a_normal_law() -> None:
    """Scores over random blocks: a share of 1 - Phi(tau) lies above mean + tau standard deviations."""
    q, k, v = (noise(i, 2, 4096, 2, 16, scale=3.0) for i in range(3))
    for tau, share in ((0.0, 0.5), (1.0, 0.1587), (2.0, 0.0228)):
        for moments in ("diag", "exact"):
            rule = MeanStdSpec(tau=tau, moments=moments)  # type: ignore[arg-type]
            spec = BlockSparseSpec(order=RasterSpec(block=16), selector=PooledSpec(rule=rule), far=MeanSpec())
            with record() as runs:
                given(spec, q, k, v)
            assert runs[0].pairs / (2 * 2 * 4096**2) == pytest.approx(share, abs=0.02)
            site = Site(dim=32, heads=2, head_dim=16, grid=Grid(1, 1, 4096))
            # and a pair with the mean of every block
            assert spec.cost(site).pairs / 4096**2 - 1 / 16 == pytest.approx(share, abs=1e-3)


# --- (e) more is never worse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [DropSpec(), MeanSpec()], ids=lambda far: far.name)
@pytest.mark.parametrize("runs", [(1, 1), (2, 4)], ids=str)
def test_e_keeping_more_is_never_worse(far: FarSpec, runs: tuple[int, int]) -> None:
    q, k, v = (noise(i, 2, 256, 2, 8, scale=2.0) for i in range(3))
    # neighbours look alike, as they do in a video
    q, k = (z + 2.0 * noise(5 + i, 2, 16, 2, 8).repeat_interleave(16, dim=1) for i, z in enumerate((q, k)))
    full, errors = softmax(q, k, v), []
    for share in (1 / 16, 0.125, 0.25, 0.5, 0.75, 1.0):
        spec = BlockSparseSpec(order=RasterSpec(block=16), selector=top(share, runs=runs), far=far)
        errors.append(error_ratio(given(spec, q, k, v), full))
    assert all(later <= 1.02 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < EXACT < 0.05 < errors[0]


# --- (f) heads, (g) samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_f_heads_together_are_heads_one_by_one(index: int) -> None:
    order, selector, far = SETTINGS[index]
    spec = BlockSparseSpec(order=order, selector=selector, far=far)
    q, k, v = (noise(i, 2, 105, 3, 8, scale=2.0) for i in range(3))
    together = given(spec, q, k, v, grid=(3, 5, 7))
    for head in range(3):
        alone = given(spec, *(z[:, :, head : head + 1] for z in (q, k, v)), grid=(3, 5, 7))
        assert_close(f"head {head}", together[:, :, head : head + 1], alone, EXACT)


def test_f_a_share_per_head_is_that_share_alone() -> None:
    shares = (0.1, 0.5, 1.0)
    q, k, v = (noise(i, 2, 105, 3, 8, scale=2.0) for i in range(3))
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=BudgetSpec(of=top(0.3), heads=shares), far=MeanSpec())
    together = given(spec, q, k, v)
    for head, share in enumerate(shares):
        one = replace(spec, selector=top(share))
        alone = given(one, *(z[:, :, head : head + 1] for z in (q, k, v)))
        assert_close(f"head {head}", together[:, :, head : head + 1], alone, EXACT)


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_g_a_batch_of_two_is_two_batches_of_one(index: int) -> None:
    order, selector, far = SETTINGS[index]
    spec = BlockSparseSpec(order=order, selector=selector, far=far)
    q, k, v = (noise(i, 2, 105, 2, 8, scale=2.0) for i in range(3))
    together = given(spec, q, k, v, grid=(3, 5, 7))
    for i in range(2):
        alone = given(spec, q[i : i + 1], k[i : i + 1], v[i : i + 1], grid=(3, 5, 7))
        assert_close(f"sample {i}", together[i : i + 1], alone, EXACT)
    assert error_ratio(together[:1], together[1:]) > 0.1


def test_d_blocks_of_different_sizes_are_visited_as_the_largest() -> None:
    """What the plan says is visited is what the kernel computes, slots that no token fills included."""
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(2, 5, 7))
    spec = BlockSparseSpec(order=TilesSpec(tile=(1, 4, 4)), selector=AllSpec())
    cost = spec.cost(site)
    q, k, v = (noise(i, 1, site.tokens, 2, 8) for i in range(3))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        given(spec, q, k, v, grid=site.grid)
    # 8 tiles of at most 16 tokens
    assert cost.visited_pairs == (8 * 16) ** 2 == counter.get_total_flops() / (4 * site.inner)
    single = replace(spec, order=ByQuerySpec(tile=(1, 4, 4)))
    assert single.cost(site).visited == cost.pairs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        given(single, q, k, v, grid=site.grid)
    assert counter.get_total_flops() == 4 * cost.pairs * site.inner


# --- (h) small and ragged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [(1, 1, 1), (1, 1, 9), (1, 1, 17), (1, 5, 5), (2, 2, 2), (5, 1, 5), (3, 3, 11), (1, 1, 8)], ids=str
)
@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_h_tails_of_one_token_single_blocks_and_images(index: int, grid: tuple[int, int, int]) -> None:
    """A last block of one token, one block in all, one token in all, one frame."""
    order, selector, far = SETTINGS[index]
    site = Site(dim=20, heads=3, head_dim=8, grid=Grid(*grid), rope=Rope(axes=(4, 2, 2)))
    # runs of four tokens need blocks of four
    for at in (order, RasterSpec(block=8), RasterSpec(block=1 if index else 4)):
        compare(BlockSparseSpec(order=at, selector=selector, far=far), site)


def test_h_one_block_is_full_attention() -> None:
    for tokens in (1, 2, 9):
        q, k, v = (noise(i, 1, tokens, 2, 8, scale=2.0) for i in range(3))
        for selector in (top(0.01), AllSpec(), PooledSpec(rule=TopPSpec(p=0.1)), BandSpec(width=0)):
            for far in (DropSpec(), MeanSpec()):
                spec = BlockSparseSpec(order=RasterSpec(block=16), selector=selector, far=far)
                assert_close(f"{tokens} tokens", given(spec, q, k, v), softmax(q, k, v), EXACT)
