"""The core of block-sparse attention in 16 bits: queries, keys and values as given, the oracle on the same rounded numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.raw import block_of, given, noise
from tests.oracles.block_sparse import block_sparse, chosen_blocks
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.budgets import BudgetSpec
from ultrazoo.attention.parts.far import CoarseSpec, DropSpec, FarSpec, MeanSpec
from ultrazoo.attention.parts.orders import CurveSpec, OrderSpec, RasterSpec, TilesSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import MeanStdSpec, TopKOrPSpec, TopKSpec, TopPSpec, kept, largest
from ultrazoo.attention.parts.selectors import BandSpec, SelectorSpec, UnionSpec
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.spec import Site
from ultrazoo.testing import TOLERANCES, Case, ReferenceHost, assert_close, error_ratio, null_answers

GRID = (3, 5, 7)
HEADS, SIZE = 3, 8


def case_of(spec: BlockSparseSpec, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int] = GRID) -> Case:
    """A case whose host hands over q, k, v (B, N, heads, D) as they are, in fp64."""
    heads, size = q.shape[2:]
    width = heads * size
    eye = torch.eye(3 * width, dtype=torch.float64)
    weights = {f"{name}.weight": eye[i * width : (i + 1) * width] for i, name in enumerate("qkv")}
    weights["o.weight"] = torch.eye(width, dtype=torch.float64)
    x = torch.cat([z.detach().double().flatten(2) for z in (q, k, v)], dim=-1)
    site = Site(dim=3 * width, heads=heads, head_dim=size, grid=Grid(*grid))
    return Case(spec, site, x, grid, ReferenceHost(weights, heads, size), {})


def answer(spec: BlockSparseSpec, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int] = GRID) -> Tensor:
    """What the module gives in the dtype of q."""
    module = block_of(spec, q.shape[2], q.shape[3], q.shape[1], grid).to(q.dtype)
    return given(spec, q, k, v, module, grid)


def expected(spec: BlockSparseSpec, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int] = GRID) -> Tensor:
    found = block_sparse(case_of(spec, q, k, v, grid))
    assert isinstance(found, Tensor)
    return found.unflatten(-1, q.shape[2:])


SETTINGS: list[tuple[OrderSpec, SelectorSpec, FarSpec]] = [
    (RasterSpec(block=8), PooledSpec(rule=TopKSpec(share=0.3)), DropSpec()),
    (RasterSpec(block=(8, 4)), PooledSpec(rule=TopKSpec(share=0.2), runs=(2, 2), centre=True), MeanSpec()),
    (TilesSpec(tile=(2, 2, 3)), PooledSpec(rule=MeanStdSpec(tau=0.3)), MeanSpec(order=1)),
    (CurveSpec(block=6), UnionSpec(of=(PooledSpec(rule=TopPSpec(p=0.5)), BandSpec())), CoarseSpec(gate="none")),
    (TilesSpec(tile=(1, 3, 3)), PooledSpec(rule=TopKOrPSpec(share=0.1), key_bias="log_norm"), DropSpec()),
    (RasterSpec(block=5), PooledSpec(rule=TopKSpec(count=4), key_bias="log_variance"), MeanSpec()),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_narrow_inputs_give_what_the_oracle_gives(index: int, dtype: torch.dtype) -> None:
    """Scores, statistics and softmax are in fp32 and choose the same blocks; within the table of tolerances."""
    order, selector, far = SETTINGS[index]
    spec = BlockSparseSpec(order=order, selector=selector, far=far)
    q, k, v = (noise(10 * index + i, 2, 105, HEADS, SIZE, scale=2.0).to(dtype) for i in range(3))
    found, reference = answer(spec, q, k, v), expected(spec, q, k, v)
    assert found.dtype == dtype
    assert_close("output", found, reference, TOLERANCES[dtype].output)
    for wrong, other in null_answers(reference, v.double()).items():
        assert error_ratio(other, reference) > 3 * TOLERANCES[dtype].output, f"accepts {wrong}"


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_gradients_of_narrow_inputs(index: int) -> None:
    """Of q, k and v in bf16 against fp64 on the same numbers."""
    order, selector, far = SETTINGS[index]
    spec = BlockSparseSpec(order=order, selector=selector, far=far)
    leaves = [noise(10 * index + i, 1, 105, HEADS, SIZE).bfloat16().requires_grad_() for i in range(3)]
    wide = [z.detach().double().requires_grad_() for z in leaves]
    probe = noise(7, 1, 105, HEADS, SIZE)
    # the wide module is held to the oracle everywhere else
    grads = torch.autograd.grad((answer(spec, *leaves) * probe).sum(), leaves)
    references = torch.autograd.grad((answer(spec, *wide) * probe).sum(), wide)
    for name, one, reference in zip("qkv", grads, references, strict=True):
        assert_close(f"gradient of {name}", one, reference, TOLERANCES[torch.bfloat16].gradient)


# --- ties -------------------------------------------------------------------------------------------------------------


def repeated(blocks: int, size: int, patterns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of which many blocks are equal, in another order of tokens: their means are equal to the last bit.

    All numbers are multiples of 1/4, so that sums of them are exact in every dtype.
    """
    draw = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(-6, 7, (patterns, size, 2, SIZE), generator=g) / 4
    rows = [kinds[draw.randrange(patterns)][torch.randperm(size, generator=g)] for _ in range(blocks)]
    k = torch.cat(rows)[None].double()
    q = (torch.randint(-6, 7, (1, blocks * size, 2, SIZE), generator=g) / 4).double()
    return q, k, noise(seed, 1, blocks * size, 2, SIZE)


TIED: dict[str, SelectorSpec] = {
    "top-k": PooledSpec(rule=TopKSpec(count=5)),
    "per head": BudgetSpec(of=PooledSpec(), heads=(0.2, 0.5)),
    "top-p": PooledSpec(rule=TopPSpec(p=0.4)),
    "floor": PooledSpec(rule=TopPSpec(p=0.01, floor=0.4)),
    "either": PooledSpec(rule=TopKOrPSpec(share=0.3, p=0.3)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", TIED)
def test_ties_go_to_the_block_that_comes_first(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        spec = BlockSparseSpec(order=RasterSpec(block=4), selector=TIED[name])
        q, k, v = (z.to(dtype) for z in repeated(16, 4, 4, seed))
        grid = (1, 1, 64)
        means = k[0].double().unflatten(0, (16, 4)).mean(1)
        assert len({tuple(row) for row in means.flatten(1).tolist()}) <= 4
        assert_close(name, answer(spec, q, k, v, grid), expected(spec, q, k, v, grid), TOLERANCES[dtype].output)


def test_all_scores_equal_keeps_the_first() -> None:
    """In bf16 a score would tie with its neighbours; here all do, and the first blocks are kept."""
    q, v = (
        noise(0, 1, 64, 1, SIZE).bfloat16(),
        torch.arange(64.0).bfloat16()[None, :, None, None].expand(1, -1, 1, SIZE),
    )
    k = noise(1, 1, 1, 1, SIZE).bfloat16().expand(1, 64, -1, -1)
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=PooledSpec(rule=TopKSpec(count=3)))
    y = answer(spec, q, k, v, (1, 1, 64))
    assert_close("mean of 24 tokens", y, torch.full_like(y, 11.5), 1e-2)


def test_scores_that_differ_less_than_bf16_tells_are_told_apart() -> None:
    """Scores are in fp32: of two blocks whose scores bf16 would round to one number, the better is kept."""
    q = torch.ones(1, 16, 1, SIZE).bfloat16()
    k = torch.ones(1, 16, 1, SIZE)
    k[:, 8] = 1.0078125
    k = k.bfloat16()
    v = torch.cat([torch.zeros(1, 8, 1, SIZE), torch.ones(1, 8, 1, SIZE)], dim=1).bfloat16()
    first, second = (float(k[0, i : i + 8].double().mean()) * SIZE**0.5 for i in (0, 8))
    assert torch.tensor(first).bfloat16() == torch.tensor(second).bfloat16()
    assert first < second
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=PooledSpec(rule=TopKSpec(count=1)))
    y = answer(spec, q, k, v, (1, 1, 16))
    assert torch.equal(y, torch.ones_like(y))


# --- rules by themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [0, 1, 3, 8, 9, [1, 5, 9], [0, 2, 9]], ids=str)
def test_the_largest_of_a_row(counts: int | list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (2, 3, 5, 9), generator=g).double()
    scores[0, 0, 0, ::2] = float("-inf")
    found = largest(scores, torch.tensor(counts)[None, :, None, None] if isinstance(counts, list) else counts)
    per_head = counts if isinstance(counts, list) else [counts] * 3
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        row = scores[b, h, i].tolist()
        ranked = sorted(range(9), key=lambda j, row=row: (-row[j], j))
        assert found[b, h, i].nonzero()[:, 0].tolist() == sorted(ranked[: per_head[h]])


@pytest.mark.parametrize(
    ("share", "blocks", "more", "count"),
    [
        (0.1, 30, {}, 3),
        (0.1, 31, {}, 4),
        (0.1, 31, {"down": True}, 3),
        (0.7, 10, {}, 7),
        (0.3, 10, {"down": True}, 3),
        (0.01, 10, {"down": True}, 1),
        (0.25, 590, {"multiple": 8}, 152),
        (0.9, 10, {"multiple": 8}, 10),
        (0.1, 10, {"least": 4}, 4),
        (0.1, 3, {"least": 4}, 3),
        (1.0, 7, {}, 7),
    ],
)
def test_a_share_as_a_number_of_blocks(share: float, blocks: int, more: dict[str, Any], count: int) -> None:
    assert kept(share, blocks, **more) == count


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"count": 3}, 3),
        ({"count": 3, "multiple": 4}, 4),
        ({"count": 1, "least": 2}, 2),
        ({"count": 9, "multiple": 4}, 10),
    ],
    ids=str,
)
def test_a_number_of_blocks_takes_multiple_and_least(options: dict[str, int], count: int) -> None:
    rule = TopKSpec(**options)  # type: ignore[arg-type]
    assert rule.number(10) == count
    assert rule.counts(10) == (count, count, count)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_mass_of_one_is_every_block(scale: float) -> None:
    """However small a block's mass: a float rounds it away, the rule does not."""
    spec = BlockSparseSpec(order=RasterSpec(block=4), selector=PooledSpec(rule=TopPSpec(p=1.0)))
    q, k, v = (noise(i, 1, 64, 2, SIZE).float() for i in range(3))
    _, chosen = chosen_blocks(case_of(spec, q * scale, k, v, (1, 1, 64)))
    assert bool(chosen.all())
    full = answer(BlockSparseSpec(order=RasterSpec(block=64)), q * scale, k, v, (1, 1, 64))
    assert_close("full", answer(spec, q * scale, k, v, (1, 1, 64)), full, 1e-5)
    assert spec.traits().exact_at_init


def test_a_larger_mass_keeps_more() -> None:
    q, k, v = (noise(i, 1, 64, 2, SIZE) for i in range(3))
    visited = []
    for p in (0.1, 0.5, 0.9, 0.999, 1.0):
        spec = BlockSparseSpec(order=RasterSpec(block=4), selector=PooledSpec(rule=TopPSpec(p=p)))
        with record() as runs:
            answer(spec, q, k, v, (1, 1, 64))
        visited.append(runs[0].pairs)
    assert visited == sorted(visited)
    assert visited[0] < visited[2] < visited[-1] == 2 * 64**2


def test_row_normalised_scores_are_dfsattn_s() -> None:
    """Softmax of every query tile over all key tiles, summed over the tiles of a block pair; the highest sums are kept."""
    q, k, v = (noise(i, 1, 64, 2, 8, scale=3.0) for i in range(3))
    tiles = [z.unflatten(1, (16, 4)).mean(2) for z in (q, k)]
    mass = (torch.einsum("bahd,bchd->bhac", *tiles) / 8**0.5).softmax(-1).unflatten(3, (4, 4)).unflatten(2, (4, 4))
    sums = mass.sum((3, 5))  # (1, heads, query blocks, key blocks)
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, sums.topk(2).indices, True)
    mask = chosen.repeat_interleave(16, 2).repeat_interleave(16, 3)
    pairs = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5).masked_fill(~mask, float("-inf"))
    due = torch.einsum("bhnm,bmhd->bnhd", pairs.softmax(-1), v)
    rule = TopKSpec(share=0.5, rounding="down")
    row, none = (
        BlockSparseSpec(order=RasterSpec(block=16), selector=PooledSpec(rule=rule, runs=(4, 4), normalise=how))
        for how in ("row", "none")
    )
    assert_close("rows", given(row, q, k, v), due, 1e-11)
    assert error_ratio(given(none, q, k, v), due) > 0.1
