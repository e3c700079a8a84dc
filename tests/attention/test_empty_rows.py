"""Rows for which a selector chooses nothing: the far field alone answers, they merge with the others, or the setting is refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.attention.raw import given, noise, softmax
from tests.oracles.block_sparse import block_sparse, chosen_blocks
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.far import CoarseSpec, DropSpec, FarSpec, MeanSpec
from ultrazoo.attention.parts.far_linear import LinearFarSpec
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import MeanStdSpec
from ultrazoo.attention.parts.selectors import BandSpec, UnionSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import Segment, Site
from ultrazoo.testing import assert_close
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-11


def test_rows_with_nothing_near_are_what_the_far_field_gives() -> None:
    """No block above the threshold: attention among block means; a far field that would leave zeros is refused."""
    q, k, v = (noise(i, 2, 40, 2, 8, scale=2.0).requires_grad_() for i in range(3))
    nothing = PooledSpec(rule=MeanStdSpec(tau=1e6))
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=nothing, far=MeanSpec())
    means = [z.unflatten(1, (5, 8)).mean(2) for z in (k, v)]
    far = given(spec, q, k, v)
    assert_close("among means", far, softmax(q, *means), EXACT)
    grads = torch.autograd.grad(far.square().sum(), (q, k, v))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(1, 1, 40))
    fars: list[FarSpec] = [DropSpec(), CoarseSpec(), LinearFarSpec()]
    for other in fars:
        (problem,) = replace(spec, far=other).problems(site)
        assert problem.path == "selector"
        assert f"which far {other.name!r} leaves without an answer" in problem.rule
    # a band, or keys that all see, is an answer
    forced = replace(spec, selector=UnionSpec(of=(nothing, BandSpec(width=0))), far=DropSpec())
    assert forced.problems(site) == []
    assert replace(spec, far=DropSpec()).problems(site.at(extra=(Segment("text", 3),))) == []


def test_some_rows_with_nothing_near_merge_with_the_others() -> None:
    """A threshold that some rows reach and others do not, against the oracle, gradients too."""
    rule = MeanStdSpec(tau=1.2, moments="exact")
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=PooledSpec(rule=rule), far=MeanSpec())
    site = Site(dim=20, heads=3, head_dim=8, grid=Grid(1, 6, 8))
    scenario = Scenario(Example(spec, site, "empty"), torch.float64)
    scenario.x.requires_grad_()
    case = scenario.case(requires_grad=True)
    _, chosen = chosen_blocks(case)
    assert bool((chosen.sum(-1) == 0).any())
    assert bool((chosen.sum(-1) > 0).any())
    got, expected = scenario.run(), block_sparse(case)
    assert isinstance(expected, Tensor)
    assert_close("output", got, expected, EXACT)
    (found,) = torch.autograd.grad(got.square().sum(), scenario.x)
    (reference,) = torch.autograd.grad(expected.square().sum(), case.x)
    assert_close("gradient", found, reference, 10 * EXACT)
