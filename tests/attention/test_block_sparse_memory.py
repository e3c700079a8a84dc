"""Memory of block-sparse attention without gradients: in proportion to tokens times channels, allocation by allocation."""

from __future__ import annotations

import pytest
import torch

from tests.attention.raw import GivenHost, block_of
from tests.cost.test_memory import Held
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.contract import Call
from ultrazoo.attention.parts import far, scene
from ultrazoo.attention.parts.far import CoarseSpec, DropSpec, FarSpec, MeanSpec
from ultrazoo.attention.parts.orders import CurveSpec, OrderSpec, RasterSpec, TilesSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import MeanStdSpec, TopKSpec, TopPSpec
from ultrazoo.attention.parts.selectors import BandSpec, SelectorSpec, SinkSpec, UnionSpec
from ultrazoo.kernels import block_map, dense, gathered

HEADS, SIZE = 4, 32
GRIDS = [(4, 32, 32), (8, 32, 32), (16, 32, 32)]
BLOCKS = RasterSpec(block=64)

SETTINGS: list[tuple[OrderSpec, SelectorSpec, FarSpec]] = [
    (BLOCKS, PooledSpec(rule=TopKSpec(share=0.1)), DropSpec()),
    (BLOCKS, PooledSpec(rule=TopKSpec(share=0.1), runs=(4, 4)), DropSpec()),
    (BLOCKS, UnionSpec(of=(PooledSpec(rule=MeanStdSpec()), BandSpec())), MeanSpec()),
    (BLOCKS, PooledSpec(rule=TopPSpec(p=0.2), key_bias="log_norm"), MeanSpec(order=1)),
    (TilesSpec(tile=(4, 4, 4)), PooledSpec(rule=TopKSpec(share=0.1)), CoarseSpec(gate="none")),
    (CurveSpec(block=64), UnionSpec(of=(BandSpec(), SinkSpec())), DropSpec()),
    (RasterSpec(block=(4, 64)), PooledSpec(rule=TopKSpec(share=0.1)), DropSpec()),
]


def peaks(spec: BlockSparseSpec) -> list[float]:
    """Most bytes held at once, in units of tokens x channels x 4 bytes, at 4096, 8192 and 16384 tokens."""
    found = []
    for grid in GRIDS:
        tokens = grid[0] * grid[1] * grid[2]
        module = block_of(spec, HEADS, SIZE, tokens, grid).float()
        x = torch.randn(1, tokens, 3 * HEADS * SIZE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), Held(module) as held:
            module(x, GivenHost(HEADS), Call(grid=grid))
        found.append(held.peak / (4 * tokens * HEADS * SIZE))
    return found


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_memory_grows_no_faster_than_tokens(index: int) -> None:
    order, selector, beside = SETTINGS[index]
    found = peaks(BlockSparseSpec(order=order, selector=selector, far=beside))
    assert found[2] <= 1.15 * found[0], found
    # queries, keys, values and their copies in order, the output twice, and working memory of a fixed size
    assert max(found) < 20, found


def test_the_measure_sees_what_is_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the bounds on what is held at a time, scores and maps of the whole grid show."""
    for bounds in (scene.SCORES, far.SCORE_BYTES, block_map.CHUNK_BYTES):
        monkeypatch.setitem(bounds, "cpu", 1 << 40)
    # working memory of a fixed size would hide what grows
    monkeypatch.setattr(gathered, "STEP_BYTES", 1 << 18)
    monkeypatch.setattr(dense, "SCORE_BYTES", 1 << 18)
    found = peaks(BlockSparseSpec(order=BLOCKS, selector=SETTINGS[1][1]))
    assert found[2] > 1.3 * found[0], found
    found = peaks(BlockSparseSpec(order=BLOCKS, far=MeanSpec()))
    assert found[2] > 1.3 * found[0], found
