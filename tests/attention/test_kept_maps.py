"""Maps kept over steps: what they hold, the bytes they take, and the bytes that a plan says."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
import torch

from tests.attention.raw import GivenHost, block_of
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.contract import Call
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.budgets import BudgetSpec
from ultrazoo.attention.parts.cached import CachedSpec
from ultrazoo.attention.parts.kept import KeptRows, index_bytes, kept_bytes
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopKSpec, TopPSpec
from ultrazoo.attention.parts.selectors import SelectorSpec, UnionSpec
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.cost import price
from ultrazoo.grid import Grid
from ultrazoo.spec import Site

HEADS, SIZE, BLOCK = 2, 4, 4
CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.06, 0.07, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (2, 3, 7, 130), (1, 2, 1, 70000)], ids=str)
def test_kept_rows_are_what_was_kept(shape: tuple[int, ...], share: float) -> None:
    found = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    kept = KeptRows.of(found)
    assert torch.equal(kept.rows(CPU), found)
    assert kept.nbytes == kept_bytes(found[..., 0].numel(), shape[-1], int(found.sum()))
    assert kept.nbytes <= -(-found.numel() // 8), "never more than bits"


def test_rows_without_a_visit_and_a_view_of_one_row() -> None:
    found = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    found[..., 7] = True
    wide = found.expand(1, 2, 3, 200).clone()
    wide[:, 1] = False
    assert torch.equal(KeptRows.of(wide).rows(CPU), wide)
    kept = KeptRows.of(found.expand(1, 1, 3, 200))
    assert torch.equal(kept.rows(CPU), found.expand(1, 1, 3, 200))


def test_indices_are_as_short_as_the_blocks_allow() -> None:
    assert [index_bytes(blocks) for blocks in (1, 65536, 65537)] == [2, 2, 4]


def spec_of(of: SelectorSpec) -> BlockSparseSpec:
    return BlockSparseSpec(order=RasterSpec(block=BLOCK), selector=CachedSpec(of=of, every=3))


def kept_after_a_call(spec: BlockSparseSpec, blocks: int) -> tuple[int, int]:
    """Bytes of all maps in the state, and bytes of the machine's memory that live on after a call without a trace."""
    grid = (1, 1, blocks * BLOCK)
    module = block_of(spec, HEADS, SIZE, grid[2], grid).float()
    x = torch.randn(1, grid[2], 3 * HEADS * SIZE, generator=torch.Generator().manual_seed(0))
    state: dict[Any, Any] = {}

    def run(step: int) -> None:
        with torch.no_grad():
            module(x, GivenHost(HEADS), Call(grid=grid, step=(step, 9), state=state))

    run(0)
    state.clear()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run(0)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    (kept,) = state.values()
    return sum(rows.nbytes for rows in kept.rows.values()), held


def test_memory_grows_with_visited_blocks() -> None:
    """A fixed number of blocks per row: four times the blocks keep four times the bytes, where bits would be sixteen."""
    spec = spec_of(PooledSpec(rule=TopKSpec(count=6)))
    sizes = [256, 1024]
    (small, _), (large, held) = (kept_after_a_call(spec, blocks) for blocks in sizes)
    assert small == HEADS * sizes[0] * (2 * 6 + 4)
    assert large == 4 * small
    assert large < HEADS * sizes[1] ** 2 / 8 / 7
    # beside the arrays some small objects
    assert large <= held < 1.5 * large + 20_000


def test_a_share_of_the_blocks_keeps_two_bytes_a_visit() -> None:
    stored, _ = kept_after_a_call(spec_of(PooledSpec(rule=TopKSpec(share=0.02))), 512)
    assert stored == HEADS * 512 * (2 * 11 + 4)


def test_a_dense_map_keeps_bits() -> None:
    stored, _ = kept_after_a_call(spec_of(PooledSpec(rule=TopKSpec(share=0.9))), 256)
    assert stored == HEADS * 256 * 256 // 8


# --- what a plan says -------------------------------------------------------------------------------------------------

SITE = Site(dim=HEADS * SIZE, heads=HEADS, head_dim=SIZE, grid=Grid(1, 1, 256 * BLOCK))
TOP = PooledSpec(rule=TopKSpec(count=6))


def test_a_plan_counts_the_means_that_a_drift_is_from() -> None:
    plain, drifts = (
        BlockSparseSpec(order=RasterSpec(block=BLOCK), selector=CachedSpec(of=TOP, drift=drift))
        for drift in (None, 8.0)
    )
    assert drifts.cost(SITE).kept_bytes - plain.cost(SITE).kept_bytes == 2 * HEADS * SIZE * 4


@pytest.mark.parametrize("rule", [TopKSpec(count=6), TopKSpec(share=0.02), TopKSpec(share=0.9)], ids=str)
def test_a_plan_counts_what_a_call_keeps(rule: TopKSpec) -> None:
    spec = spec_of(PooledSpec(rule=rule))
    assert spec.cost(SITE).kept_bytes == kept_after_a_call(spec, 256)[0]


def test_a_plan_is_never_below_where_the_data_decides() -> None:
    spec = spec_of(PooledSpec(rule=TopPSpec(p=0.05)))
    assert spec.cost(SITE).kept_bytes == HEADS * 256 * 256 // 8 >= kept_after_a_call(spec, 256)[0]


def test_parts_around_a_kept_map_count_it() -> None:
    one = spec_of(TOP).cost(SITE).kept_bytes
    assert one == HEADS * 256 * 16
    assert BlockSparseSpec(order=RasterSpec(block=BLOCK), selector=TOP).cost(SITE).kept_bytes == 0
    twice = UnionSpec(of=(CachedSpec(of=TOP), CachedSpec(of=TOP)))
    assert BlockSparseSpec(order=RasterSpec(block=BLOCK), selector=twice).cost(SITE).kept_bytes == 2 * one
    inside = CachedSpec(of=BudgetSpec(of=TOP, heads=(0.02, 0.02)))
    assert BlockSparseSpec(order=RasterSpec(block=BLOCK), selector=inside).cost(SITE).kept_bytes == one
    half = ByHeadSpec(groups={"0": spec_of(TOP), "1": FullSpec()})
    assert half.cost(SITE).kept_bytes == one // 2


def test_the_peak_of_a_layer_holds_its_map() -> None:
    model = WanSpec(dim=16, heads=2, layers=2, ffn_dim=32, text_dim=8, text_tokens=4)
    sites = model.sites(Grid(4, 16, 16))
    plain = BlockSparseSpec(order=RasterSpec(block=BLOCK), selector=TOP)
    plans = [price(model, sites, [one] * 2, grid=Grid(4, 16, 16), dtype="float32") for one in (plain, spec_of(TOP))]
    for without, kept in zip(*(plan.layers for plan in plans), strict=True):
        assert kept.peak_bytes - without.peak_bytes == 2 * 256 * 16
