"""PISA: what the first-order term is worth, what the scores prefer, counts, switches and edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ultrazoo
from tests.attention.raw import block_of, given, noise, softmax
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.contract import Extra
from ultrazoo.attention.parts import states
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.scene import Scene
from ultrazoo.attention.pisa import PisaSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12


def site(*grid: int) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid))


def scene_of(q: Tensor, k: Tensor, v: Tensor, block: int, key_valid: Tensor | None = None) -> Scene:
    """A scene of q, k, v (B, N, heads, D)."""
    place = RasterSpec(block=block).place(Grid(1, 1, k.shape[1]))
    return Scene(place, *(z.transpose(1, 2) for z in (q, k, v)), q.new_zeros(q.shape[0], 1, 1), key_valid)


@pytest.mark.parametrize(
    ("blocks", "density", "kept"), [(5, 0.1, 1), (19, 0.1, 1), (29, 0.1, 2), (30, 0.1, 3), (20, 0.15, 3)]
)
def test_kept_blocks_are_rounded_down_to_one_at_least(blocks: int, density: float, kept: int) -> None:
    at = site(1, 1, 64 * blocks)
    far = at.tokens * blocks
    assert PisaSpec(density=density).cost(at).pairs - far == at.tokens * 64 * kept


def test_cost_at_a_published_size() -> None:
    """2 N² D (density + 1/64) + 2 N d D multiply-adds, and as much once more for the norms that choose."""
    at = Site(dim=5120, heads=40, head_dim=128, grid=Grid(21, 45, 80))
    zeroth, first = PisaSpec(order=0, score="plain").cost(at), PisaSpec(score="plain").cost(at)
    assert zeroth.pairs / at.tokens**2 == pytest.approx(0.1 + 1 / 64, rel=2e-3)
    assert first.other_flops - zeroth.other_flops == 2 * 2 * at.tokens * at.head_dim * at.inner
    norms = PisaSpec(order=0).cost(at).other_flops - zeroth.other_flops
    assert norms == 2 * at.tokens * at.head_dim * at.inner


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("score", ["norm", "variance", "plain"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
def test_every_block_kept_is_full_attention(order: Any, score: Any, tokens: int) -> None:
    q, k, v = (noise(tokens + i, 2, tokens, 2, 8, scale=2.0) for i in range(3))
    spec = PisaSpec(density=1.0, block=8, score=score, order=order)
    assert_close("density 1", given(spec, q, k, v), softmax(q, k, v), EXACT)
    assert spec.traits().exact_at_init


@pytest.mark.parametrize("order", [0, 1])
def test_equal_values_come_back(order: Any) -> None:
    """Weights add up to one; a first-order term of equal values is zero."""
    q, k = (noise(i, 2, 70, 2, 8, scale=2.0) for i in range(2))
    v = noise(9, 1, 1, 2, 8).expand(2, 70, -1, -1)
    assert_close("values", given(PisaSpec(block=8, order=order), q, k, v), v, EXACT)


def test_the_first_order_is_what_it_says() -> None:
    """Blocks that all vary alike: halving how far keys lie from their mean halves the error of order 0 and quarters that
    of order 1, once both numerator and denominator are those of a Taylor expansion."""
    blocks, size, dim = 12, 8, 8
    q, centres = noise(0, 1, blocks * size, 1, dim), noise(1, 1, blocks, 1, 1, dim)
    offsets = noise(2, 1, 1, size, 1, dim)
    offsets = offsets - offsets.mean(2, keepdim=True)
    means, lean = noise(3, 1, blocks, 1, 1, dim), noise(4, dim, dim)
    v = (means + offsets @ lean).expand(1, blocks, size, 1, dim).flatten(1, 2)
    errors: dict[int, list[float]] = {0: [], 1: []}
    for spread in (0.2, 0.1, 0.05):
        k = (centres + spread * offsets).expand(1, blocks, size, 1, dim).flatten(1, 2)
        full = softmax(q, k, v)
        for order in (0, 1):
            spec = PisaSpec(block=size, density=0.1, order=order, score="plain")  # type: ignore[arg-type]
            errors[order].append(error_ratio(given(spec, q, k, v), full))
    assert errors[1][0] < 0.5 * errors[0][0]
    for earlier, later in zip(errors[0], errors[0][1:], strict=False):
        assert 1.7 < earlier / later < 2.3
    for earlier, later in zip(errors[1], errors[1][1:], strict=False):
        assert 3.3 < earlier / later < 4.7


def test_the_norm_prefers_blocks_whose_keys_move_with_their_values() -> None:
    """Two blocks of equal means, one constant: the other is the one that a mean describes badly."""
    q, flat = noise(0, 1, 8, 1, 8), noise(1, 1, 1, 1, 8)
    swing = noise(2, 1, 8, 1, 8)
    swing = swing - swing.mean(1, keepdim=True)
    k = torch.cat([flat.expand(1, 8, -1, -1), flat + swing], dim=1)
    v = torch.cat([noise(3, 1, 8, 1, 8), swing], dim=1)
    for score, bias in (("norm", states.log_norms), ("variance", states.log_variances)):
        first, second = bias(scene_of(q, k, v, 8))[0, 0].tolist()
        assert second > first + 3, score
        module = block_of(PisaSpec(block=8, density=0.5, score=score), 1, 8, 16)  # type: ignore[arg-type]
        chosen = module.selector(scene_of(k, k, v, 8))(0, 2)
        assert chosen[0, 0].tolist() == [[False, True]] * 2


def test_a_block_of_one_token_has_a_finite_score() -> None:
    q, k, v = (noise(i, 1, 17, 1, 8) for i in range(3))
    scene = scene_of(q, k, v, 8)
    assert float(states.log_norms(scene)[0, 0, 2]) == pytest.approx(-11.5129, abs=1e-3)
    assert float(states.log_variances(scene)[0, 0, 2]) == pytest.approx(-27.631, abs=1e-3)
    assert given(PisaSpec(block=8), q, k, v).isfinite().all()


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("tokens", [40, 37, 33])
def test_states_some_at_a_time_are_states(tokens: int, valid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (noise(tokens + i, 2, tokens, 2, 8) for i in range(3))
    key_valid = noise(7, 2, tokens) > -0.5 if valid else None
    answers = []
    for most in (1 << 23, 1):
        monkeypatch.setitem(states.STATE_BYTES, "cpu", most)
        scene = scene_of(q, k, v, 8, key_valid)
        assert len(list(states._steps(scene))) == (1 if most > 1 else 5)
        answers.append([states.log_norms(scene), states.log_variances(scene), states.first_order(scene)])
    for one, two in zip(*answers, strict=True):
        assert_close("some at a time", one, two, EXACT)


def test_small_variances_survive_large_means() -> None:
    """Keys far from zero in fp32: a difference of squares would be noise."""
    q, k, v = (noise(i, 1, 32, 1, 8) for i in range(3))
    near, far = scene_of(q, k * 1e-2, v, 8), scene_of(q.float(), (k * 1e-2 + 100).float(), v.float(), 8)
    assert_close("variances", states.log_variances(far), states.log_variances(near), 1e-3)


def test_the_variant_of_sglang_stops_at_order_zero() -> None:
    expanded = PisaSpec(score="variance", order=0).expand(site(1, 1, 64))
    assert isinstance(expanded, BlockSparseSpec)
    assert expanded.selector.key_bias == "log_variance"  # type: ignore[attr-defined]
    assert expanded.far.order == 0  # type: ignore[attr-defined]


def test_gradients_reach_everything_through_the_first_order() -> None:
    q, k, v = (noise(i, 1, 20, 1, 4).requires_grad_() for i in range(3))
    module = block_of(PisaSpec(block=4, density=0.2), 1, 4, 20)
    assert torch.autograd.gradcheck(lambda *z: given(PisaSpec(), *z, module), (q, k, v), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.1}, "density"),
        ({"order": 2}, "order"),
        ({"score": "sum"}, "score"),
    ],
    ids=str,
)
def test_bad_options_name_their_path(options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError, match=path):
        ultrazoo.create_attention("pisa", dim=16, heads=2, **options)


def test_a_sample_without_a_real_key_has_gradients_that_are_numbers() -> None:
    """Neither near nor far is anything there: two sums of nothing."""
    module = ultrazoo.create_attention("pisa", dim=16, heads=2, block=4, qk_norm=True)
    x, valid = torch.randn(2, 7, 16), torch.rand(2, 7) > 0.3
    valid[0] = False
    extra = Extra(*(torch.randn(2, 1, 2, 8) for _ in range(3)), torch.tensor([[False], [True]]))
    y, _ = module(3 * x, (1, 1, 7), key_valid=valid, extra=extra)
    y.sum().backward()
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert len(grads) > 5
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)
