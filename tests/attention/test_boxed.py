"""Attention over boxes: against a dense mask in outputs and gradients, in slabs and in graphs, with keys that all see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.oracles.masked import product_mask
from ultrazoo import registry
from ultrazoo.attention import boxed, grouped
from ultrazoo.attention.boxed import Job, attend_boxes
from ultrazoo.attention.contract import Extra
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.kernels import record
from ultrazoo.ops import boxes
from ultrazoo.ops.boxes import AxisView, Boxes
from ultrazoo.spec import AttentionSpec, Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12
VIEWS = {
    "sliding": (boxes.neighborhood(4, 3, causal=True), boxes.neighborhood(7, 3, 2), boxes.neighborhood(9, 3, 1, 2)),
    "tiles": (boxes.sliding_tiles(5, 2, 1), boxes.sliding_tiles(6, 2, 3), boxes.sliding_tiles(7, 2, 3)),
    "lines": (boxes.whole(3), boxes.neighborhood(6, 1), boxes.neighborhood(7, 1)),
    "causal": (boxes.neighborhood(4, 4, causal=True), boxes.whole(3), boxes.whole(5)),
    "whole": (boxes.whole(2), boxes.whole(3), boxes.whole(4)),
}


def mask_of(views: tuple[AxisView, ...]) -> Tensor:
    """(N, N) bool."""
    axes = []
    for view in views:
        order = view.order()
        keys: list[list[int]] = [[] for _ in order]
        for place, token in enumerate(order):
            keys[token] = [order[p] for p in range(view.low[place], view.high[place])]
        axes.append(keys)
    return product_mask(axes)


def inputs(tokens: int, total: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, n, 3, 8, dtype=dtype, requires_grad=True) for n in (tokens, total, total)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, job: Job) -> Tensor:
    """The same by one matrix of scores."""
    scale = q.shape[-1] ** -0.5 if job.scale is None else job.scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if job.log_weight is not None:
        scores = scores + job.log_weight[:, None, None]
    if job.valid is not None:
        mask = mask & job.valid[:, None, None]
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def check(found: Boxes, mask: Tensor, job: Job, total: int) -> None:
    """Output and gradients of q, k and v, and the pairs that reach the door."""
    q, k, v = inputs(mask.shape[0], total)
    with record() as runs:
        y = attend_boxes(q, k, v, job)
    expected = dense(q, k, v, mask, job)
    assert_close("output", y, expected, EXACT)
    assert sum(run.pairs for run in runs) == 6 * (boxes.visited(found) + mask.shape[0] * job.always)
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(z, (q, k, v), weight) for z in (y, expected))
    for name, a, b in zip("qkv", got, wanted, strict=True):
        assert_close(f"gradient of {name}", a, b, EXACT)
    with torch.no_grad():
        assert_close("without gradients", attend_boxes(q, k, v, job), expected, EXACT)
    assert error_ratio(dense(q, k, v, torch.ones_like(mask), job), expected) > 0.1 or bool(mask.all())


@pytest.mark.parametrize("slab", [1, 1 << 23], ids=["one tile at a time", "large slabs"])
@pytest.mark.parametrize("name", VIEWS)
def test_boxes_equal_a_dense_mask(name: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", slab)
    views = VIEWS[name]
    found = boxes.fitted(*views)
    check(found, mask_of(views), Job(found, scale=0.7), mask_of(views).shape[0])


@pytest.mark.parametrize("name", VIEWS)
def test_other_keys_weights_and_invalid_keys(name: str) -> None:
    views = VIEWS[name]
    found, mask = boxes.fitted(*views), mask_of(views)
    tokens, always = mask.shape[0], 5
    torch.manual_seed(1)
    valid, weight = torch.rand(2, tokens + always) > 0.3, torch.randn(2, tokens + always, dtype=torch.float64)
    valid[:, -1] = True
    mask = torch.cat([mask, torch.ones(tokens, always, dtype=torch.bool)], dim=1)
    job = Job(found, always, valid, weight)
    check(found, mask, job, tokens + always)
    check(found, mask, replace(job, valid=None), tokens + always)


@pytest.mark.parametrize("name", VIEWS)
def test_the_form_for_graphs_is_the_same(name: str) -> None:
    found = boxes.fitted(*VIEWS[name])
    q, k, v = inputs(math.prod(found.grid), math.prod(found.grid))
    job = Job(found)
    got, expected = boxed._assembled(q, k, v, job), attend_boxes(q, k, v, job)
    assert_close("assembled", got, expected, EXACT)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), weight) for y in (got, expected)), strict=True):
        assert_close("gradient", a, b, EXACT)


def test_a_query_without_a_valid_key_gets_zero() -> None:
    found = boxes.fitted(boxes.neighborhood(1, 1), boxes.neighborhood(4, 1), boxes.neighborhood(5, 1))
    q, k, v = inputs(20, 20)
    valid = torch.arange(20).expand(2, -1) % 3 > 0
    y = attend_boxes(q, k, v, Job(found, valid=valid))
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert torch.equal(y[valid], v[valid])
    assert y[~valid].abs().max() == 0
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_nothing_is_gathered_where_all_is_one_tile() -> None:
    found = boxes.fitted(*VIEWS["whole"])
    q, k, v = inputs(24, 24)
    with record() as runs:
        attend_boxes(q, k, v, Job(found))
    assert [(run.q[0], run.q[2], run.k[2]) for run in runs] == [(2, 24, 24)]


def test_memory_does_not_grow_with_what_is_gathered() -> None:
    """Keys come to every tile that sees them, 27 times over; at once there is one slab of them."""
    found = boxes.fitted(*(boxes.neighborhood(24, 9) for _ in range(3)))
    q, k, v = (torch.randn(1, 24**3, 2, 16) for _ in range(3))
    with torch.no_grad(), record() as runs:
        attend_boxes(q, k, v, Job(found))
    slabs = [run.k[0] * run.k[2] * 2 * 16 * 4 for run in runs]
    assert max(slabs) <= grouped.SLAB_BYTES["cpu"] // 2
    assert sum(slabs) > 10 * k.numel() * 4


def test_backward_keeps_nothing_but_queries_keys_and_values() -> None:
    found = boxes.fitted(*VIEWS["sliding"])
    q, k, v = inputs(math.prod(found.grid), math.prod(found.grid))
    kept: list[Tensor] = []

    def keep(z: Tensor) -> Tensor:
        kept.append(z)
        return z

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        attend_boxes(q, k, v, Job(found))
    assert {z.data_ptr() for z in kept} == {q.data_ptr(), k.data_ptr(), v.data_ptr()}


NAMES = ("neighborhood", "sliding_tile", "freeswim", "atlasvid")
EXAMPLES = [
    pytest.param(spec, site, id=f"{name}-{i}")
    for name in NAMES
    for i, (spec, site) in enumerate(registry.find("attention", name).examples())
]


@pytest.mark.parametrize(("spec", "site"), EXAMPLES)
def test_slabs_change_nothing(spec: AttentionSpec, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Standalone(spec, site)
    reset_parameters(module)
    x = torch.randn(2, site.tokens, site.dim)
    extra = Extra(*(torch.randn(2, 3, site.heads, site.head_dim) for _ in range(3)))
    with torch.no_grad():
        whole = module(x, site.grid, None, extra, torch.rand(2, site.tokens) > 0.2)
        again = torch.rand(2, site.tokens) > 0.2
        whole = module(x, site.grid, None, extra, again)
        monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", 1)
        pieces = module(x, site.grid, None, extra, again)
    for one, two in zip(whole, pieces, strict=True):
        assert error_ratio(two, one) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_plans_of_the_largest_grid_are_quick(name: str) -> None:
    """At 685 440 tokens: cost counts, and a few rows of what is seen add up to it."""
    from ultrazoo.grid import Grid
    from ultrazoo.options import parse_part

    cls = registry.find("attention", name)
    spec, problems = parse_part("attention", {"name": name, **cls.minimal})
    assert problems == []
    site = Site(dim=1536, heads=12, head_dim=128, grid=Grid(21, 136, 240), layers=30)
    assert spec.problems(site) == []
    cost = spec.cost(site)
    assert cost.pairs <= (cost.visited_pairs or cost.pairs) < site.tokens**2 / 2
    rows = spec.visible(site, [0, site.tokens // 2, site.tokens - 1])
    assert rows.shape[1:] == (3, site.tokens)
    assert rows.any(-1).all()
    some = rows[0]
    assert (spec.reach(site, some) >= some).all()
