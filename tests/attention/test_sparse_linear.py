"""SLA: its two forms, what each key is counted in, sums of states, switches and edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ultrazoo
from tests.attention.raw import block_of, given, noise, softmax
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts import far_linear, states
from ultrazoo.attention.parts.far_linear import LinearFarSpec
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopKSpec
from ultrazoo.attention.parts.selectors import BandSpec
from ultrazoo.attention.sparse_linear import SparseLinearSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12


def site(*grid: int, **more: Any) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid), **more)


def with_proj(spec: SparseLinearSpec, heads: int, dim: int, tokens: int) -> Any:
    """The module with a projection that passes the linear part on, unchanged."""
    module = block_of(spec, heads, dim, tokens)
    with torch.no_grad():
        module.far.proj.weight.copy_(torch.eye(dim))
    return module


def linear_part(spec: SparseLinearSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The linear part alone: with the projection less without it."""
    heads, dim, tokens = q.shape[2], q.shape[3], q.shape[1]
    with torch.no_grad():
        return given(spec, q, k, v, with_proj(spec, heads, dim, tokens)) - given(spec, q, k, v)


@pytest.mark.parametrize(
    ("form", "share", "blocks", "kept"),
    [
        *(("released", None, 512, 102), ("released", 0.1, 512, 51), ("paper", None, 512, 25)),
        *(("released", 0.1, 9, 1), ("paper", None, 3, 1), ("released", None, 1, 1), ("released", 1.0, 7, 7)),
    ],
)
def test_kept_blocks_are_rounded_down_to_one_at_least(form: Any, share: float | None, blocks: int, kept: int) -> None:
    """int(0.1 · 9) = 0 would leave a softmax over nothing."""
    at = site(1, 1, 64 * blocks)
    assert SparseLinearSpec(form=form, share=share).cost(at).pairs == at.tokens * 64 * kept


def test_cost_at_the_published_size() -> None:
    """Wan 1.3B at 480p: 52.75 to 2.74 TFLOP, which is 5 % of the pairs and the reading of a state of D x D."""
    at = Site(dim=1536, heads=12, head_dim=128, grid=Grid(21, 30, 52))
    cost = SparseLinearSpec(form="paper").cost(at)
    core = 4 * at.tokens**2 * at.inner
    reading = 2 * at.tokens * at.head_dim * at.inner
    assert (cost.attention_flops + reading) / core == pytest.approx(2.74 / 52.75, rel=0.03)
    released = SparseLinearSpec().cost(at)
    assert released.parameters == 128 * 129
    state_and_proj = released.other_flops - 2 * 256 * 512 * at.inner
    # K^T V, the reading of it, and the projection; the normaliser is read by sums
    assert state_and_proj == 3 * reading


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 50])
def test_all_blocks_without_a_projection_are_full_attention(form: Any, tokens: int) -> None:
    q, k, v = (noise(tokens + i, 2, tokens, 2, 8, scale=2.0) for i in range(3))
    spec = SparseLinearSpec(form=form, share=1.0, block=(8, 4))
    assert_close("share 1", given(spec, q, k, v), softmax(q, k, v), EXACT)
    assert spec.traits().exact_at_init


@pytest.mark.parametrize("form", ["released", "paper"])
def test_a_fresh_block_is_its_softmax_part(form: Any) -> None:
    q, k, v = (noise(i, 1, 60, 2, 8, scale=2.0) for i in range(3))
    spec = SparseLinearSpec(form=form, share=0.3, block=(4, 4))
    rule = TopKSpec(share=0.3, rounding="down")
    alone = BlockSparseSpec(order=RasterSpec(block=4), selector=PooledSpec(rule=rule))
    assert_close("drop", given(spec, q, k, v), given(alone, q, k, v), EXACT)
    assert error_ratio(given(spec, q, k, v), softmax(q, k, v)) > 0.01
    assert not spec.traits().exact_at_init


@pytest.mark.parametrize("phi", ["softmax", "elu", "relu"])
def test_the_released_form_reads_every_key(phi: Any) -> None:
    q, k, v = (noise(i, 1, 30, 2, 8) for i in range(3))
    f = far_linear.FEATURES[phi]
    pairs = torch.einsum("bnhc,bmhc->bhnm", f(q), f(k))
    expected = torch.einsum("bhnm,bmhd->bnhd", pairs / (pairs.sum(-1, keepdim=True) + 1e-5), v)
    assert_close("linear", linear_part(SparseLinearSpec(phi=phi, block=(4, 4)), q, k, v), expected, EXACT)


def kept_and_between(
    q: Tensor, k: Tensor, block: int, kept: int, skipped: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Per query block the best key blocks, and those that are neither best nor lowest (one head)."""
    count = q.shape[1] // block
    means = [z[0, :, 0].unflatten(0, (count, block)).mean(1) for z in (q, k)]
    ranks = (means[0] @ means[1].T).argsort(-1, descending=True).tolist()
    return [row[:kept] for row in ranks], [row[kept : count - skipped] for row in ranks]


@pytest.mark.parametrize(("skip", "skipped"), [(0.0, 0), (0.04, 0), (0.1, 2), (0.5, 10), (0.95, 19)])
def test_the_paper_s_form_leaves_out_the_lowest_share(skip: float, skipped: int) -> None:
    q, k, v = (noise(i, 1, 80, 1, 8) for i in range(3))
    spec = SparseLinearSpec(form="paper", share=0.1, skip=skip, block=(4, 4))
    found = linear_part(spec, q, k, v)
    _, between = kept_and_between(q, k, 4, 2, skipped)
    rows = []
    for i, blocks in enumerate(between):
        tokens = [4 * j + r for j in blocks for r in range(4)]
        weights = q[0, 4 * i : 4 * i + 4, 0].softmax(-1) @ k[0, tokens, 0].softmax(-1).T
        rows.append(weights @ v[0, tokens, 0] / (weights.sum(-1, keepdim=True) + (1e-5 if tokens else 1.0)))
    expected = torch.cat(rows)[None, :, None]
    if skipped == 19:
        assert not bool(found.any()), "nothing lies between the best 2 and the lowest 19 of 20"
    else:
        assert_close("between", found, expected, EXACT)


@pytest.mark.parametrize("phi", ["softmax", "elu", "relu"])
def test_a_query_without_a_key_left_reads_zero(phi: Any) -> None:
    q, k, v = (noise(i, 1, 24, 1, 8) for i in range(3))
    spec = SparseLinearSpec(form="paper", share=1.0, block=(4, 4), phi=phi)
    assert not bool(linear_part(spec, q, k, v).any())


def test_features_of_zero_are_no_division_by_zero() -> None:
    """relu of queries and keys without a common channel."""
    q = noise(0, 1, 16, 1, 8).abs()
    k, v = -noise(1, 1, 16, 1, 8).abs(), noise(2, 1, 16, 1, 8)
    for form in ("released", "paper"):
        spec = SparseLinearSpec(form=form, phi="relu", block=(4, 4))  # type: ignore[arg-type]
        assert not bool(linear_part(spec, q, k, v).any())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("tokens", [60, 61])
def test_some_query_and_key_blocks_at_a_time(
    form: Any, tokens: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (noise(tokens + i, 2, tokens, 2, 8).requires_grad_(grad) for i in range(3))
    spec = SparseLinearSpec(form=form, share=0.3, block=(6, 4))
    module = with_proj(spec, 2, 8, tokens)
    weight = noise(5, 2, tokens, 2, 8)

    def answers() -> list[Tensor]:
        y = given(spec, q, k, v, module)
        return [y, *torch.autograd.grad((y * weight).sum(), (q, k, v))] if grad else [y]

    whole = answers()
    monkeypatch.setattr(far_linear, "ROWS", 3)
    monkeypatch.setattr(far_linear, "CHOSEN", 1)
    monkeypatch.setitem(states.STATE_BYTES, "cpu", 1)
    assert len(far_linear.query_groups(10)) == 4
    for one, two in zip(answers(), whole, strict=True):
        assert_close("some at a time", one, two, 1e-11)


def test_many_query_blocks_make_sixteen_groups() -> None:
    groups = far_linear.query_groups(10_710)
    assert len(groups) == 16
    assert (groups[0][0], groups[-1][1]) == (0, 10_710)
    assert far_linear.query_groups(64) == [(0, 64)]


def test_small_complements_keep_their_digits() -> None:
    """One block of 50 is left, in fp32 after a common part a thousand times as large: no difference of large sums."""
    q, k, v = (noise(i, 1, 200, 1, 8) for i in range(3))
    v = v.clone()
    v[:, :196] += 1e4
    far = LinearFarSpec(keys="complement")
    chosen = PooledSpec(rule=TopKSpec(count=49))
    spec = BlockSparseSpec(order=RasterSpec(block=4), selector=chosen, far=far)
    # every query is drawn to all blocks but the last
    k[:, 196:] -= 20 * q.mean(1, keepdim=True).sign()
    q = q.abs() * q.mean(1, keepdim=True).sign()
    answers = []
    for dtype in (torch.float64, torch.float32):
        module = block_of(spec, 1, 8, 200).to(dtype)
        with torch.no_grad():
            module.far.proj.weight.copy_(torch.eye(8))
            full = given(spec, *(z.to(dtype) for z in (q, k, v)), module)
            module.far.proj.weight.zero_()
            answers.append(full - given(spec, *(z.to(dtype) for z in (q, k, v)), module))
    left = v[:, 196:]
    assert float((answers[0].amax() - left.amax()).clamp(min=0)) == 0
    # what remains is the rounding of adding the two parts, 1e4 in fp32
    assert float((answers[1] - answers[0]).abs().max()) < 4e-3


def test_the_projection_is_shared_by_heads_and_starts_at_zero() -> None:
    module = block_of(SparseLinearSpec(), 3, 8, 20)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "far.proj.weight": (8, 8),
        "far.proj.bias": (8,),
    }
    assert not any(bool(p.any()) for p in module.parameters())


def test_skipping_belongs_to_the_paper_s_form_and_to_pooled_scores() -> None:
    (problem,) = SparseLinearSpec(skip=0.1).problems(site(1, 4, 4))
    assert problem.path == "skip"
    assert "paper" in str(problem.fix)
    spec = BlockSparseSpec(selector=BandSpec(), far=LinearFarSpec(keys="complement", skip=0.1))
    (problem,) = spec.problems(site(1, 4, 4))
    assert problem.path == "far.skip"


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
        ({"block": [64]}, "block"),
        ({"block": [0, 64]}, "block"),
        ({"skip": 0.2}, "skip"),
        ({"form": "paper", "skip": 1.0}, "skip"),
        ({"phi": "hedgehog"}, "phi"),
        ({"form": "both"}, "form"),
    ],
    ids=str,
)
def test_bad_options_name_their_path(options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError, match=path):
        ultrazoo.create_attention("sparse_linear", dim=16, heads=2, **options)
