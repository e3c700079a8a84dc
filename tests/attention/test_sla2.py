"""SLA2: the soft router and the hard one, the convex weight, switches that make it exact, edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ultrazoo
from tests.attention.raw import block_of, given, noise, softmax
from ultrazoo import assemble
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.far import MeanSpec
from ultrazoo.attention.parts.far_linear import LinearFarSpec
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopKSpec
from ultrazoo.attention.parts.scene import Scene
from ultrazoo.attention.parts.selectors import BandSpec, UnionSpec
from ultrazoo.attention.parts.soft import soft_topk
from ultrazoo.attention.sla2 import Sla2Spec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12


def site(*grid: int) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid))


def module_of(spec: Sla2Spec, heads: int, dim: int, tokens: int, alpha: float | None = None) -> Any:
    """The module; with `alpha` every head's weight is its sigmoid."""
    module = block_of(spec, heads, dim, tokens)
    if alpha is not None:
        with torch.no_grad():
            module.far.alpha.fill_(alpha)
    return module


@pytest.mark.parametrize("router", ["hard", "soft"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 50])
def test_every_block_and_a_weight_of_one_are_full_attention(router: Any, tokens: int) -> None:
    q, k, v = (noise(tokens + i, 2, tokens, 2, 8, scale=2.0) for i in range(3))
    spec = Sla2Spec(share=1.0, router=router, block=(8, 4))
    dense = softmax(q, k, v)
    assert_close("alpha 1", given(spec, q, k, v, module_of(spec, 2, 8, tokens, alpha=60.0)), dense, EXACT)
    # nothing is left for the linear part
    assert_close("alpha 1/2", given(spec, q, k, v, module_of(spec, 2, 8, tokens, alpha=0.0)), dense / 2, EXACT)
    assert not spec.traits().exact_at_init


def test_a_weight_of_zero_is_linear_attention_of_the_rest() -> None:
    q, k, v = (noise(i, 1, 40, 1, 8) for i in range(3))
    spec = Sla2Spec(share=0.2, block=(4, 4))
    y = given(spec, q, k, v, module_of(spec, 1, 8, 40, alpha=-800.0))
    centred = k - k.mean(1, keepdim=True)
    qc, kc = (z[0, :, 0].unflatten(0, (10, 4)).mean(1) for z in (q, centred))
    ranks = (qc @ kc.T).argsort(-1, descending=True).tolist()
    for i, row in enumerate(ranks):
        rest = [4 * j + r for j in row[2:] for r in range(4)]
        weights = q[0, 4 * i : 4 * i + 4, 0].softmax(-1) @ centred[0, rest, 0].softmax(-1).T
        expected = weights @ v[0, rest, 0] / weights.sum(-1, keepdim=True)
        assert_close(f"query block {i}", y[0, 4 * i : 4 * i + 4, 0], expected, EXACT)


def test_a_fresh_router_ranks_as_sla_s() -> None:
    q, k, v = (noise(i, 1, 60, 2, 8) for i in range(3))
    spec = Sla2Spec(share=0.2, block=(6, 4))
    place = RasterSpec(block=(6, 4)).place(Grid(1, 1, 60))
    chosen = []
    for one in (spec, BlockSparseSpec(order=RasterSpec(block=(6, 4)), selector=PooledSpec(rule=TopKSpec(share=0.2)))):
        scene = Scene(place, *(z.transpose(1, 2) for z in (q, k, v)), q.new_zeros(1, 60, 1))
        chosen.append(block_of(one, 2, 8, 60).selector(scene)(0, place.queries.count))
    assert torch.equal(*chosen)
    assert int(chosen[0][0, 0, 0].sum()) == 3


# --- the soft choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("wanted", [1.0, 2.5, 7.0, 15.9])
def test_soft_rows_add_up(wanted: float, tau: float, dtype: torch.dtype) -> None:
    p = noise(3, 2, 3, 5, 16, scale=3.0).to(dtype).softmax(-1)
    weights = soft_topk(p, torch.ones_like(p, dtype=torch.bool), wanted, tau).sigmoid()
    assert bool(((weights >= 0) & (weights <= 1)).all())
    assert_close(
        "sums", weights.sum(-1), torch.full_like(weights[..., 0], wanted), 1e-10 if dtype == torch.float64 else 1e-5
    )
    # higher scores weigh more
    order = p.argsort(-1)
    assert bool((weights.gather(-1, order).diff(dim=-1) >= -1e-6).all())


@pytest.mark.parametrize("wanted", [3.0, 3.5, 16.0])
def test_soft_rows_with_too_few_valid_blocks_take_all(wanted: float) -> None:
    p = noise(4, 1, 1, 4, 16).softmax(-1)
    valid = torch.zeros_like(p, dtype=torch.bool)
    valid[..., :3] = True
    weights = soft_topk(p, valid, wanted, 0.1).sigmoid()
    assert bool((weights[..., :3] == 1).all())
    some = soft_topk(p, valid, 2.0, 0.1).sigmoid()
    assert_close("valid ones alone", some[..., :3].sum(-1), torch.full((1, 1, 4), 2.0).double(), 1e-10)


def test_the_gradient_of_the_soft_choice_is_that_of_its_constraint() -> None:
    """Raising one score moves every weight, and their sum stays."""
    p = noise(5, 1, 1, 3, 8).softmax(-1).requires_grad_()

    def weights(p: Tensor) -> Tensor:
        return soft_topk(p, torch.ones_like(p, dtype=torch.bool), 2.5, 0.1).sigmoid()

    assert torch.autograd.gradcheck(weights, (p,))
    (grad,) = torch.autograd.grad(weights(p).sum(), p)
    assert float(grad.abs().max()) < 1e-10


def test_a_cold_soft_choice_is_the_hard_one() -> None:
    q, k, v = (noise(i, 1, 40, 2, 8, scale=2.0) for i in range(3))
    hard = given(Sla2Spec(share=0.3, block=(8, 4)), q, k, v)
    errors = []
    for tau in (1.0, 1e-2, 1e-7):
        errors.append(error_ratio(given(Sla2Spec(share=0.3, block=(8, 4), router="soft", tau=tau), q, k, v), hard))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_the_soft_router_learns_to_imitate_full_attention() -> None:
    """The first stage: q, k, v are given, the router and alpha follow full attention by its squared error."""
    torch.manual_seed(0)
    q, k, v = (noise(i, 2, 128, 2, 8, scale=1.5) for i in range(3))
    # channels that the plain mean mixes up: the router may turn them
    q, k = q + 2 * noise(7, 1, 16, 1, 8).repeat_interleave(8, 1), k + 2 * noise(8, 1, 16, 1, 8).repeat_interleave(8, 1)
    full = softmax(q, k, v)
    module = module_of(Sla2Spec(share=0.15, router="soft", block=(8, 8)), 2, 8, 128)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=2e-2), []
    for _ in range(25):
        loss = (given(Sla2Spec(), q, k, v, module) - full).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())


def test_the_hard_router_takes_the_trained_weights_and_is_frozen() -> None:
    q, k, v = (noise(i, 1, 40, 2, 8) for i in range(3))
    soft = module_of(Sla2Spec(share=0.2, router="soft", block=(8, 4)), 2, 8, 40)
    assert all(p.requires_grad for p in soft.parameters())
    with torch.no_grad():
        soft.selector.query.weight.add_(noise(6, 8, 8))
    hard = module_of(Sla2Spec(share=0.2, block=(8, 4)), 2, 8, 40)
    fresh = given(Sla2Spec(), q, k, v, hard)
    hard.load_state_dict(soft.state_dict())
    y = given(Sla2Spec(), q, k, v, hard)
    assert error_ratio(y, fresh) > 1e-3
    y.sum().backward()
    frozen = {name for name, p in hard.named_parameters() if not p.requires_grad}
    assert frozen == set(hard.spec.traits().frozen) == {"selector.query.weight", "selector.key.weight"}
    assert hard.far.alpha.grad is not None


def test_a_model_keeps_the_router_frozen() -> None:
    for name, trains in (("sla2_tiny", False), ("sla2_router_tiny", True)):
        model = assemble.build(name)
        routers = [p for key, p in model.named_parameters() if ".selector." in key]
        assert [p.requires_grad for p in routers] == [trains] * 4
        assert torch.equal(routers[0], torch.eye(24))


# --- counts, places and options -------------------------------------------------------------------------------------


def test_cost_at_the_published_size() -> None:
    """Wan 1.3B at 480p: 52.75 to 2.87 and 1.82 TFLOP at 5 and 3 %; states add h (N/128) (N/64) d² as the paper's sums do."""
    at = Site(dim=1536, heads=12, head_dim=128, grid=Grid(21, 30, 52))
    core, linear = 4 * at.tokens**2 * at.inner, 4 * at.tokens * at.head_dim * at.inner
    for share, published in ((0.05, 2.87), (0.03, 1.82)):
        cost = Sla2Spec(share=share).cost(at)
        assert (cost.attention_flops + linear) / core == pytest.approx(published / 52.75, rel=0.02)
    cost = Sla2Spec().cost(at)
    router = 2 * (256 * 512 + (256 + 512) * 128) * at.inner
    sums = 2 * 256 * 512 * (128 + 1) * at.inner
    groups = 4
    rest = cost.other_flops - router - sums
    assert rest == 2 * at.tokens * at.head_dim * at.inner * (1 + groups)
    assert cost.parameters == 2 * 128**2 + 12


def test_training_the_router_costs_every_pair() -> None:
    at = site(1, 4, 50)
    cost = Sla2Spec(router="soft").cost(at)
    assert cost.pairs == cost.pairs_min == cost.pairs_max == 200**2


def test_alpha_starts_where_it_is_told() -> None:
    for start in (0.9, 0.25):
        module = module_of(Sla2Spec(alpha=start), 3, 8, 20)
        assert_close("alpha", module.far.alpha.sigmoid(), torch.full((3,), start).double(), 1e-6)


def test_soft_rules_stand_alone() -> None:
    soft = PooledSpec(rule=TopKSpec(share=0.5, soft=0.1))
    at = site(1, 4, 8)
    (problem,) = BlockSparseSpec(selector=UnionSpec(of=(soft, BandSpec()))).problems(at)
    assert problem.path == "selector"
    (problem,) = BlockSparseSpec(selector=soft, far=MeanSpec()).problems(at)
    assert problem.path == "far"
    (problem,) = BlockSparseSpec(selector=soft, far=LinearFarSpec(keys="complement", skip=0.1)).problems(at)
    assert problem.path == "far.skip"
    biased = PooledSpec(rule=TopKSpec(share=0.5, soft=0.1), key_bias="log_norm")
    (problem,) = BlockSparseSpec(selector=biased).problems(at)
    assert problem.path == "selector.key_bias"


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"share": 0.0}, "share"),
        ({"alpha": 1.0}, "alpha"),
        ({"tau": 0.0}, "tau"),
        ({"router": "none"}, "router"),
        ({"block": [128, 64, 64]}, "block"),
    ],
    ids=str,
)
def test_bad_options_name_their_path(options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError, match=path):
        ultrazoo.create_attention("sla2", dim=16, heads=2, **options)
