"""Key blocks with the queries that chose them: the same output, log-sum-exp and gradients as a dense mask in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultrazoo.errors import KernelError
from ultrazoo.kernels import attend, block_map, by_key, record
from ultrazoo.kernels.block_map import BlockMap
from ultrazoo.ops.blocks import Blocks, even_blocks
from ultrazoo.testing import TOLERANCES, error_ratio

KEYS = Blocks((0, 5, 6, 14, 22, 27))
BATCH, HEADS, N, D, DV = 2, 3, 17, 8, 6


def chosen(seed: int = 0) -> Tensor:
    """Bool (B, heads, N, blocks): uneven over blocks and heads; a query without any, a block without any in one head."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(BATCH, HEADS, 1, KEYS.count, generator=generator)
    found = torch.rand(BATCH, HEADS, N, KEYS.count, generator=generator) < share
    found[0, 1, 3] = False
    found[1, 2, :, 2] = False
    return found


def map_of(wanted: Tensor, queries: Blocks | None = None) -> BlockMap:
    one_each = even_blocks(N, 1) if queries is None else queries
    return BlockMap(one_each, KEYS, lambda lo, hi: wanted[:, :, lo:hi], BATCH, HEADS, torch.device("cpu"))


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, HEADS, N, D), (BATCH, HEADS, KEYS.tokens, D), (BATCH, HEADS, KEYS.tokens, DV))
    made = [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [z.to(dtype).requires_grad_() for z in made]


def dense(q: Tensor, k: Tensor, v: Tensor, wanted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """By a mask of all pairs; no key at all: zeros and minus infinity."""
    seen = wanted.repeat_interleave(torch.tensor(KEYS.sizes), dim=-1)
    seen = seen if mask is None else seen & mask
    scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(~seen, float("-inf"))
    some = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~some, 0.0).softmax(-1) * some
    return weights @ v, scores.logsumexp(-1)


@pytest.fixture(params=["one head", "several heads", "chunks"])
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is done at a time: as on a CPU, as on a GPU, and a few queries of the map at a time."""
    if request.param != "one head":
        monkeypatch.setitem(by_key.GROUP_BYTES, "cpu", 1 << 20)
        monkeypatch.setattr(by_key, "SPREAD", 100.0)
    if request.param == "chunks":
        monkeypatch.setitem(block_map.CHUNK_BYTES, "cpu", 5 * BATCH * HEADS * KEYS.count)


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_a_dense_mask(dtype: torch.dtype, masked: bool) -> None:
    wanted, mask = chosen(), None
    if masked:
        mask = torch.ones(BATCH, 1, 1, KEYS.tokens, dtype=torch.bool)
        mask[0, ..., 4:9] = False
        mask[1, ..., 19] = False
    ours, theirs = inputs(dtype), [z.detach().double().requires_grad_() for z in inputs(dtype)]
    with record() as runs:
        found = attend(*ours, key_mask=mask, block_map=map_of(wanted), return_lse=True)
    assert [run.kernel for run in runs] == ["by_key"]
    expected = dense(*theirs, wanted, mask)
    some = expected[1] > float("-inf")
    assert not some.all()
    assert torch.equal(found[1] > float("-inf"), some)
    assert error_ratio(found[0], expected[0]) <= TOLERANCES[dtype].output
    assert error_ratio(found[1][some], expected[1][some]) <= TOLERANCES[dtype].output
    assert (found[0][~some] == 0).all()
    weight = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for y, norm in (found, expected):
        ((y.double() * weight).sum() + norm.double()[some].square().sum()).backward()
    for one, reference in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert reference.grad is not None
        assert error_ratio(one.grad, reference.grad) <= TOLERANCES[dtype].gradient
        assert error_ratio(reference.grad / 2, reference.grad) > TOLERANCES[dtype].gradient


def test_equal_to_the_gathering_kernel() -> None:
    made, wanted = [z.detach() for z in inputs(torch.float64)], chosen(3)
    one, other = (attend(*made, block_map=map_of(wanted), kernel=name) for name in ("by_key", "gathered"))
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    assert error_ratio(one, other) < 1e-12


def test_blocks_of_several_queries_are_not_its_own() -> None:
    made = [z.detach() for z in inputs(torch.float32)]
    wanted = chosen()[:, :, :9]
    with pytest.raises(KernelError, match="blocks of one query"):
        attend(*made, block_map=map_of(wanted, even_blocks(N, 2)), kernel="by_key")
    with record() as runs:
        attend(*made, block_map=map_of(wanted, even_blocks(N, 2)))
    assert [run.kernel for run in runs] == ["gathered"]
