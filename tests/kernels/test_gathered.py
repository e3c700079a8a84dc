"""The block-sparse kernel that needs no compiler against dense masks: outputs, log-sum-exps and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ultrazoo.errors import KernelError
from ultrazoo.kernels import attend, record
from ultrazoo.kernels import dense as dense_module
from ultrazoo.kernels import gathered as module
from ultrazoo.kernels.block_map import BlockMap
from ultrazoo.ops.blocks import Blocks, even_blocks, of_sizes
from ultrazoo.testing import TOLERANCES, assert_close, error_ratio

BATCH, HEADS, SIZE = 2, 3, 8
VALUES = SIZE
"""Channels of values; `dense_part` sets them."""
RAGGED = of_sizes(np.array([4, 1, 6, 3, 6, 2]))
LAYOUTS: dict[str, tuple[Blocks, Blocks]] = {
    "even": (even_blocks(24, 6), even_blocks(24, 6)),
    "tail of one": (even_blocks(25, 6), even_blocks(25, 6)),
    "ragged": (RAGGED, RAGGED),
    "unequal": (even_blocks(22, 8), RAGGED),
    "single keys": (even_blocks(10, 4), even_blocks(13, 1)),
    "one block": (even_blocks(5, 8), even_blocks(7, 8)),
    "one token": (even_blocks(1, 8), even_blocks(1, 8)),
}


@dataclass
class Asked:
    """One call and the logits that a dense softmax would see."""

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor
    queries: Blocks
    keys: Blocks
    key_mask: Tensor | None = None
    log_weight: Tensor | None = None

    def map(self) -> BlockMap:
        return BlockMap(self.queries, self.keys, lambda lo, hi: self.chosen[:, :, lo:hi], BATCH, HEADS, self.q.device)

    def run(self, kernel: str = "gathered") -> tuple[Tensor, Tensor]:
        out, lse = attend(
            self.q,
            self.k,
            self.v,
            key_mask=self.key_mask,
            log_weight=self.log_weight,
            block_map=self.map(),
            return_lse=True,
            kernel=kernel,
        )
        return out, lse

    def dense(self) -> tuple[Tensor, Tensor]:
        """Softmax under the mask of tokens; a row without any key gives zeros and minus infinity."""
        rows = np.repeat(np.arange(self.queries.count), self.queries.sizes)
        columns = np.repeat(np.arange(self.keys.count), self.keys.sizes)
        allowed = self.chosen[:, :, rows][..., columns]
        if self.key_mask is not None:
            allowed = allowed & self.key_mask
        logits = self.q @ self.k.transpose(-1, -2) * SIZE**-0.5
        if self.log_weight is not None:
            logits = logits + self.log_weight
        weights = torch.where(allowed, logits.masked_fill(~allowed, 0.0).exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        return weights @ self.v / total.masked_fill(total == 0, 1.0), total.squeeze(-1).log()


def asked(
    layout: str, dtype: torch.dtype = torch.float64, density: float = 0.5, masked: bool = False, weighted: bool = False
) -> Asked:
    """Lists of uneven length, one of them empty, another with keys that the mask leaves out alone."""
    queries, keys = LAYOUTS[layout]
    g = torch.Generator().manual_seed(queries.tokens + keys.count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    q, k = normal(BATCH, HEADS, queries.tokens, SIZE), normal(BATCH, HEADS, keys.tokens, SIZE)
    v = normal(BATCH, HEADS, keys.tokens, VALUES)
    chosen = torch.rand(BATCH, HEADS, queries.count, keys.count, generator=g) < density
    chosen[0, 0, 0] = False
    if queries.count > 2:
        chosen[1, 2, 1] = True
    key_mask = log_weight = None
    if masked:
        key_mask = torch.rand(BATCH, 1, 1, keys.tokens, generator=g) < 0.7
        # every key of a block left out: rows that chose nothing else see nothing
        key_mask[0, ..., : keys.starts[1]] = False
        chosen[0, 1, -1] = False
        chosen[0, 1, -1, 0] = True
    if weighted:
        log_weight = normal(BATCH, HEADS if masked else 1, 1, keys.tokens)
    return Asked(q, k, v, chosen, queries, keys, key_mask, log_weight)


@pytest.fixture(autouse=True, params=["fused", "in_cache"])
def dense_part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What attends to gathered keys on a CPU: torch's operator for rows too long for a cache, matmuls for others."""
    if request.param == "fused":
        monkeypatch.setattr(dense_module, "ROW_BYTES", 0)
    else:
        # which values of another width get in any case
        monkeypatch.setitem(globals(), "VALUES", 5)
    return str(request.param)


MIXED = pytest.mark.parametrize(
    ("masked", "weighted"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["plain", "masked", "weighted", "both"],
)


@MIXED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_lse_equal_a_dense_mask(layout: str, masked: bool, weighted: bool) -> None:
    call = asked(layout, masked=masked, weighted=weighted)
    (out, lse), (expected, norm) = call.run(), call.dense()
    real = norm.isfinite()
    assert not bool(real.all()), "no row without a key: the case tests less than it says"
    assert torch.equal(lse.isfinite(), real)
    assert bool((lse[~real] == float("-inf")).all())
    assert bool((out[~real] == 0).all())
    if bool(real.any()):
        assert_close("lse", lse[real], norm[real], TOLERANCES[torch.float64].output)
        assert_close("output", out, expected, TOLERANCES[torch.float64].output)
        assert error_ratio(expected / 2, expected) > 0.1


@MIXED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_a_dense_mask_s(layout: str, masked: bool, weighted: bool) -> None:
    """Of q, k, v and the log-weights, through the output and through the log-sum-exp of rows that have a key."""
    call = asked(layout, masked=masked, weighted=weighted)
    leaves = {"q": call.q, "k": call.k, "v": call.v}
    if call.log_weight is not None:
        leaves["log_weight"] = call.log_weight
    for leaf in leaves.values():
        leaf.requires_grad_()
    real = call.dense()[1].isfinite()
    found = {}
    for name, run in (("gathered", call.run), ("dense", call.dense)):
        out, lse = run()
        g = torch.Generator().manual_seed(3)
        probe = torch.randn(out.shape, generator=g, dtype=torch.float64)
        loss = (out * probe).sum() + (lse[real] * torch.randn(lse[real].shape, generator=g, dtype=torch.float64)).sum()
        found[name] = torch.autograd.grad(loss, list(leaves.values()))
    for name, one, reference in zip(leaves, found["gathered"], found["dense"], strict=True):
        assert bool(one.isfinite().all()), f"the gradient of {name} is not finite"
        assert_close(f"gradient of {name}", one, reference, TOLERANCES[torch.float64].gradient)
        if bool(real.any()):
            assert bool(reference.any()), f"the gradient of {name} is zero: nothing is compared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["even", "ragged", "unequal"])
def test_narrow_types_stay_within_the_table(layout: str, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded numbers; log-sum-exps are fp32, for merging."""
    call = asked(layout, dtype, masked=True)
    wide = asked(layout, dtype, masked=True)
    wide.q, wide.k, wide.v = (z.double() for z in (call.q, call.k, call.v))
    for z in (call.q, call.k, call.v, wide.q, wide.k, wide.v):
        z.requires_grad_()
    (out, lse), (expected, norm) = call.run(), wide.dense()
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    real = norm.isfinite()
    assert_close("output", out, expected, TOLERANCES[dtype].output)
    assert_close("lse", lse[real], norm[real], TOLERANCES[dtype].output)
    grads = torch.autograd.grad(out.double().sum(), [call.q, call.k, call.v])
    references = torch.autograd.grad(expected.sum(), [wide.q, wide.k, wide.v])
    for name, one, reference in zip("qkv", grads, references, strict=True):
        assert one.dtype == dtype
        assert_close(f"gradient of {name}", one, reference, TOLERANCES[dtype].gradient)


def test_gradcheck() -> None:
    call = asked("ragged", masked=True, weighted=True)
    real = call.dense()[1].isfinite()

    def answer(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        call.q, call.k, call.v, call.log_weight = q, k, v, weight
        out, lse = call.run()
        return out, lse[real]

    assert call.log_weight is not None
    inputs = [z.requires_grad_() for z in (call.q, call.k, call.v, call.log_weight)]
    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)


def test_small_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in groups of one, map rows in chunks of one: the same answer and gradients as all at once."""
    from ultrazoo.kernels import block_map

    def gradients(make: Callable[[], Asked]) -> tuple[Tensor, ...]:
        call = make()
        leaves = [z.requires_grad_() for z in (call.q, call.k, call.v)]
        out, lse = call.run()
        return (out, *torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves))

    def make() -> Asked:
        return asked("ragged", masked=True)

    whole = gradients(make)
    monkeypatch.setitem(module.GROUP_BYTES, "cpu", 1)
    monkeypatch.setattr(module, "STEP_BYTES", 1)
    monkeypatch.setitem(block_map.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(block_map, "KEEP_BYTES", 0)
    for one, reference in zip(gradients(make), whole, strict=True):
        assert_close("in groups of one", one, reference, 1e-13)


@pytest.mark.parametrize("rows_of_chunk", [1, 2, 3])
@pytest.mark.parametrize("step_bytes", [1, 1 << 8, 1 << 20, None])
def test_lists_of_one_length(monkeypatch: pytest.MonkeyPatch, rows_of_chunk: int, step_bytes: int | None) -> None:
    """They run where they stand, in chunks of the map that may cut every head's rows; as on a GPU, too (None)."""
    from ultrazoo.kernels import block_map

    call = asked("unequal")
    call.chosen = torch.rand(call.chosen.shape, generator=torch.Generator().manual_seed(1)).argsort(-1) < 2
    monkeypatch.setattr(module, "RUN_ROWS", 1)
    monkeypatch.setitem(block_map.CHUNK_BYTES, "cpu", rows_of_chunk * BATCH * HEADS * RAGGED.count)
    if step_bytes is not None:
        monkeypatch.setattr(module, "STEP_BYTES", step_bytes)
    else:
        monkeypatch.setattr(module, "_in_steps", module._at_once)
        monkeypatch.setattr(module, "dense", lambda *args: dense_module._plain(*args[:6]))
    gathers = []
    select = torch.index_select
    monkeypatch.setattr(torch, "index_select", lambda *a, **kw: (gathers.append(a[0].shape), select(*a, **kw))[1])
    found = call.run()
    for one, reference in zip(found, call.dense(), strict=True):
        assert_close("lists of one length", one, reference, 1e-13)
    # keys and values, no queries
    assert set(gathers) == {(BATCH * HEADS * RAGGED.count, RAGGED.largest, size) for size in (SIZE, VALUES)}


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -2.5e38])
@pytest.mark.parametrize("learns", [False, True])
def test_the_lowest_weights_are_no_masks(lowest: float, learns: bool) -> None:
    """What other libraries give for "no key" is a number here, and a row that has nothing else is a mean."""
    call = asked("even", torch.float32)
    call.chosen[:] = True
    call.log_weight = torch.full((BATCH, 1, 1, call.keys.tokens), lowest)
    with torch.set_grad_enabled(learns):
        out, lse = call.run()
        same, norm = attend(call.q, call.k, call.v, log_weight=call.log_weight, return_lse=True, kernel="math")
    for one in (out, same):
        torch.testing.assert_close(one, call.v.mean(2, keepdim=True).expand_as(one))
    for one in (lse, norm):
        assert bool(one.isfinite().all())


def test_which_dense_part_runs(dense_part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that both are tested here."""
    calls = []
    for name in ("_fused", "_in_cache"):
        plain = getattr(dense_module, name)
        monkeypatch.setattr(dense_module, name, lambda *args, n=name, f=plain: (calls.append(n), f(*args))[1])
    asked("even").run()
    assert set(calls) == {f"_{dense_part}"}


def test_pairs_are_those_of_the_lists() -> None:
    call = asked("ragged")
    with record() as runs:
        call.run()
    visited = call.chosen.double().mul(torch.tensor(call.keys.sizes)).sum(-1) * torch.tensor(call.queries.sizes)
    assert [run.pairs for run in runs] == [int(visited.sum())]


def test_one_list_for_all_samples_and_heads() -> None:
    call = asked("ragged")
    call.chosen = call.chosen[:1, 1:2]
    out, _ = call.run()
    call.chosen = call.chosen.expand(BATCH, HEADS, -1, -1)
    assert torch.equal(out, call.run()[0])


@pytest.mark.parametrize("kernel", ["auto", "gathered"])
def test_types_that_differ_are_refused(kernel: str) -> None:
    call = asked("even", torch.float32)
    for name in "qkv":
        other = asked("even", torch.float32)
        setattr(other, name, getattr(call, name).bfloat16())
        with pytest.raises(KernelError, match="one dtype, they are") as caught:
            other.run(kernel)
        assert "bfloat16" in str(caught.value)
        with pytest.raises(KernelError, match="one dtype, they are"):
            attend(other.q, other.k, other.v)


@pytest.mark.parametrize("kernel", ["sdpa", "math", "flash_attn", "xformers"])
def test_kernels_without_lists_say_why_and_who_can(kernel: str) -> None:
    with pytest.raises(KernelError) as caught:
        asked("even", torch.float32).run(kernel)
    text = str(caught.value)
    assert f"kernel {kernel!r} was asked for and cannot run" in text
    assert "takes no block_map" in text
    assert "gathered: can run" in text


def test_a_bias_of_queries_is_refused() -> None:
    call = asked("even", torch.float32)
    with pytest.raises(KernelError, match="gathered: takes no bias"):
        attend(call.q, call.k, call.v, bias=torch.zeros(24, 24), block_map=call.map())


def test_second_derivatives() -> None:
    call = asked("single keys")
    leaves = [z.requires_grad_() for z in (call.q, call.k, call.v)]

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call.q, call.k, call.v = q, k, v
        return call.run()[0]

    assert torch.autograd.gradgradcheck(output, leaves, fast_mode=True)


def test_a_weight_that_learns_alone() -> None:
    """Gradients of log_weight where q, k and v have none: the backward needs the log-sum-exp all the same."""
    call = asked("ragged", weighted=True)
    assert call.log_weight is not None
    weight = call.log_weight.requires_grad_()
    found = attend(call.q, call.k, call.v, log_weight=weight, block_map=call.map(), kernel="gathered")
    assert isinstance(found, Tensor)
    ours, theirs = (torch.autograd.grad(out.square().sum(), weight)[0] for out in (found, call.dense()[0]))
    assert_close("log_weight", ours, theirs, 1e-12)
