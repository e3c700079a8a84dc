"""The three forms of dense attention of rows, against softmax in fp64 written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo.kernels import dense as module
from ultrazoo.ops.scratch import Scratch

ROWS, QUERIES, KEYS, SIZE, SCALE = 5, 3, 11, 8, 0.3
FORMS: dict[str, Callable[..., Tensor | None]] = {
    "plain": lambda *args: module._plain(*args[:6]),
    "in cache": module._in_cache,
    "fused": lambda *args: module._fused(*args[:6]),
}


def given(values: int = SIZE, masked: bool = True, whole: bool = False) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(values)
    q, k, v = (
        torch.randn(ROWS, n, d, generator=g, dtype=torch.float64)
        for n, d in ((QUERIES, SIZE), (KEYS, SIZE), (KEYS, values))
    )
    added = torch.randn(ROWS, 1, KEYS, generator=g, dtype=torch.float64)
    added[:, :, ::3] = float("-inf")
    if not whole:
        # no key at all
        added[2] = float("-inf")
    return q, k, v, added if masked else None


def written_out(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = (SCALE * torch.einsum("rmd,rnd->rmn", q, k) + (0 if added is None else added)).exp()
    total = weights.sum(-1)
    return torch.einsum("rmn,rne->rme", weights, v) / total.clamp(min=1e-300)[..., None], total.log()


@pytest.mark.parametrize(("masked", "whole"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("form", "values"), [("plain", SIZE), ("plain", 5), ("in cache", SIZE), ("in cache", 5), ("fused", SIZE)]
)
def test_against_softmax(form: str, values: int, masked: bool, whole: bool) -> None:
    q, k, v, added = given(values, masked, whole)
    out = torch.full((ROWS, QUERIES, values), torch.nan, dtype=torch.float64)
    more = None if added is None else module.Added(added, whole)
    lse = FORMS[form](q, k, v, more, SCALE, out, Scratch(), True)
    wanted, wanted_lse = written_out(q, k, v, added)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-13)


def test_scores_far_apart() -> None:
    """The largest score is taken off before the exponentials, so that no spread of scores makes them vanish or overflow."""
    q = torch.ones(1, 1, 1)
    k = torch.tensor([[[-3000.0], [2000.0], [2000.0]]])
    out = torch.empty(1, 1, 1)
    lse = module.dense(q, k, torch.tensor([[[1.0], [3.0], [5.0]]]), None, 1.0, out, Scratch(), True)
    assert lse is not None
    torch.testing.assert_close(lse, torch.tensor([[2000.0]]) + torch.tensor(2.0).log())
    torch.testing.assert_close(out, torch.tensor([[[4.0]]]))


@pytest.mark.parametrize(
    ("dtype", "keys", "form"),
    [(torch.float32, KEYS, "_in_cache"), (torch.bfloat16, KEYS, "_fused"), (torch.float32, 1 << 20, "_fused")],
)
def test_which_form(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, keys: int, form: str) -> None:
    found = []
    for name in ("_in_cache", "_fused", "_plain"):
        monkeypatch.setattr(module, name, lambda *_, n=name: found.append(n))
    q, k = torch.empty(1, QUERIES, SIZE, dtype=dtype), torch.empty(1, keys, SIZE, dtype=dtype)
    module.dense(q, k, k, None, 1.0, q, Scratch(), False)
    assert found == [form]


def test_rows_come_in_rounds_of_threads() -> None:
    threads = torch.get_num_threads()
    row = 64 * 1024 * 4
    for rows in (1, 7, 42, 64):
        step = module.rows_at_once(torch.empty(rows, 64, SIZE), 1024)
        assert step % threads == 0
        assert step <= max(threads, module.SCORE_BYTES // row)
        # the last step is no more than a round short of the others
        assert rows <= step or (-rows) % step < threads * -(-rows // step)
    assert module.rows_at_once(torch.empty(64, 64, SIZE), 1 << 24) == threads
    assert module.rows_at_once(torch.empty(64, 64, SIZE, device="meta"), 1024) == 64


def test_scratch_is_used_again() -> None:
    scratch, like = Scratch(), torch.empty(0)
    first = scratch("a", (4, 3), like)
    assert scratch("a", (2, 2), like).data_ptr() == first.data_ptr()
    assert scratch("b", (4, 3), like).data_ptr() != first.data_ptr()
    assert scratch("a", (4, 3), like, torch.float64).dtype == torch.float64
