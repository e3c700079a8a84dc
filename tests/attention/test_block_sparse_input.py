"""Settings of block-sparse attention that cannot be, each told with its path and what to write; those that look so and can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ultrazoo
from tests.attention.raw import given, noise, softmax
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.contract import Extra
from ultrazoo.attention.parts.far import CoarseSpec, MeanSpec
from ultrazoo.attention.parts.orders import RasterSpec, TilesSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopKSpec
from ultrazoo.attention.parts.selectors import BandSpec, SinkSpec, UnionSpec
from ultrazoo.attention.parts.sliding import SlidingSpec
from ultrazoo.errors import KernelError, SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Segment, Site
from ultrazoo.testing import assert_close

POOLED = {"name": "pooled"}


def ruled(name: str, **options: Any) -> dict[str, Any]:
    return {"selector": {**POOLED, "rule": {"name": name, **options}}}


def budget(**options: Any) -> dict[str, Any]:
    return {"selector": {"name": "budget", "of": POOLED, **options}}


def tiles(**options: Any) -> dict[str, Any]:
    return {"order": {"name": "tiles", **options}}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    (ruled("topk", count=0), "selector.rule.count", "at least 1"),
    (ruled("topk", share=0), "selector.rule.share", "more than 0"),
    (ruled("topk", share=1.5), "selector.rule.share", "at most 1"),
    (ruled("topk", share=-0.1), "selector.rule.share", "more than 0"),
    (ruled("topk", share=0.1, count=2), "selector.rule.share", "give one of them"),
    (ruled("topk", least=0), "selector.rule.least", "at least 1"),
    (ruled("topk", multiple=0), "selector.rule.multiple", "at least 1"),
    (ruled("topk", tau=1.0), "selector.rule.tau", "options are share, rounding, count"),
    (ruled("topp", p=0), "selector.rule.p", "more than 0"),
    (ruled("topp", p=1.1), "selector.rule.p", "at most 1"),
    (ruled("topq"), "selector.rule.name", "did you mean 'topp'?"),
    (ruled("mean_std", moments="full"), "selector.rule.moments", "diag, exact"),
    ({"selector": {**POOLED, "runs": [2, 2], "rule": {"name": "mean_std"}}}, "selector.rule.moments", "use exact"),
    ({"selector": {**POOLED, "runs": [2]}}, "selector.runs", "give two"),
    ({"selector": {**POOLED, "runs": [2, 0]}}, "selector.runs", "at least 1"),
    ({"selector": {"name": "pool"}}, "selector.name", "did you mean 'pooled'?"),
    ({"selector": {"name": "union", "of": []}}, "selector.of", "at least one selector"),
    ({"selector": {"name": "band", "width": -1}}, "selector.width", "at least 0"),
    ({"selector": {"name": "sink", "frames": 0}}, "selector.frames", "at least 1"),
    (budget(), "selector.heads", "give one of them"),
    (budget(steps={}), "selector.heads", "give one of them"),
    (budget(heads=[0.1]), "selector.heads", "give one per head"),
    (budget(heads=[0.1, 0.0]), "selector.heads", "more than 0"),
    (budget(heads=[0.1, 1.1]), "selector.heads", "at most 1"),
    (budget(steps={"first": 0.1}), "selector.steps.first", "write 0-9 or 0,4-6"),
    (budget(steps={"9-1": 0.1}), "selector.steps.9-1", "runs backwards"),
    (budget(steps={"0-9": 0.1, "4,11": 0.2}), "selector.steps.4,11", "step 4 is in '0-9' too"),
    (budget(steps={"0-9": 0}), "selector.steps.0-9", "more than 0"),
    ({"selector": {"name": "budget", "of": {"name": "band"}, "heads": [1, 1]}}, "selector.of", "pooled selector"),
    (
        {"selector": {"name": "budget", "of": {"name": "cached", "of": "routed"}, "heads": [1, 1]}},
        "selector.of",
        "no kept share",
    ),
    (
        {"selector": {"name": "budget", "of": {"name": "pooled", "rule": "mean_std"}, "heads": [1, 1]}},
        "selector.of",
        "no kept",
    ),
    (budget(of={"name": "budget", "of": POOLED, "heads": [1, 1]}, heads=[1, 1]), "selector.of", "no kept share"),
    ({"selector": {"name": "cached", "of": POOLED, "every": 0}}, "selector.every", "at least 1"),
    ({"selector": {"name": "cached", "of": POOLED, "drift": -1}}, "selector.drift", "at least 0"),
    (
        {"selector": {"name": "cached", "of": POOLED, "drift": 1, "votes": [0.8, 0.4]}},
        "selector.votes",
        "smaller one first",
    ),
    ({"selector": {"name": "cached", "of": POOLED, "drift": 1, "votes": [0.8]}}, "selector.votes", "2"),
    ({"selector": {"name": "cached", "of": POOLED, "votes": [0.4, 0.8]}}, "selector.votes", "give drift"),
    ({"selector": {"name": "cached", "of": "band"}}, "selector.of", "the same at every step"),
    ({"selector": {**POOLED, "normalise": "row"}}, "selector.normalise", "more runs of query blocks"),
    ({"selector": {**POOLED, "normalise": "column", "runs": [2, 2]}}, "selector.normalise", "none, row"),
    ({"extra_keys": "competing"}, "extra_keys", "host, always, compete"),
    ({"extra_rows": "sparse"}, "extra_rows", "host, dense, pattern, videos"),
    (tiles(tile=[]), "order.tile", "give three: (T, H, W)"),
    (tiles(tile=[4, 4]), "order.tile", "give three: (T, H, W)"),
    (tiles(tile=4), "order.tile", "expected a list"),
    (tiles(tile=[0, 4, 4]), "order.tile", "at least 1"),
    (tiles(image_tile=[4, 4]), "order.image_tile", "give three: (T, H, W)"),
    ({"order": {"name": "raster", "block": 0}}, "order.block", "at least 1"),
    ({"order": {"name": "raster", "block": []}}, "order.block", "give one, or two"),
    ({"order": {"name": "raster", "block": [4, 4, 4]}}, "order.block", "give one, or two"),
    ({"order": {"name": "spiral"}}, "order.name", "raster, columns, curve, tiles"),
    ({"order": {"name": "curve", "curve": "peano"}}, "order.curve", "hilbert, morton"),
    ({"far": {"name": "average"}}, "far.name", "drop, mean, coarse"),
    ({"far": {"name": "mean", "order": 2}}, "far.order", "0, 1"),
    ({"far": {"name": "coarse", "gate": "relu"}}, "far.gate", "linear, sigmoid, none"),
    ({"far": {"name": "linear", "skip": 0.9}}, "far.skip", "use keys: complement"),
    ({"far": {"name": "linear", "alpha": 0.1}}, "far.alpha", "use join: alpha"),
    ({"kernel": "sdp"}, "kernel", "did you mean 'sdpa'?"),
]


@pytest.mark.parametrize(("options", "path", "fix"), WRONG, ids=[f"{path}-{i}" for i, (_, path, _) in enumerate(WRONG)])
def test_wrong_options_name_their_path_and_what_to_write(options: dict[str, Any], path: str, fix: str) -> None:
    with pytest.raises(SiteError) as caught:
        ultrazoo.create_attention("block_sparse", dim=16, heads=2, **options)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert fix in f"{problem.rule} {problem.fix}"


@pytest.mark.parametrize(
    ("options", "path", "fix"),
    [
        (ruled("topk", count=100), "selector.rule.count", "100 of 1 key blocks"),
        (ruled("topk", least=100), "selector.rule.least", "100 of 1 key blocks"),
        (
            {"order": {"name": "raster", "block": 8}, **ruled("topk", share=0.1, multiple=16)},
            "selector.rule.multiple",
            "every choice is all 14 key blocks",
        ),
        ({"selector": {**POOLED, "runs": [2, 200]}}, "selector.runs", "at most 128"),
        (
            {"selector": {"name": "union", "of": [{"name": "band"}, {**POOLED, "rule": {"name": "topk", "count": 9}}]}},
            "selector.of.1.rule.count",
            "at most 1",
        ),
    ],
    ids=["count", "least", "multiple", "runs", "inside a union"],
)
def test_what_only_the_size_shows_is_told_when_the_size_is_known(options: dict[str, Any], path: str, fix: str) -> None:
    with pytest.raises(SiteError) as caught:
        ultrazoo.create_attention("block_sparse", dim=16, heads=2, **options)(torch.zeros(1, 105, 16), (3, 5, 7))
    (problem,) = caught.value.problems
    assert problem.path == path
    assert fix in f"{problem.rule} {problem.fix}"


def test_a_count_may_be_all_there_are() -> None:
    q, k, v = (noise(i, 1, 35, 2, 8, scale=2.0) for i in range(3))
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=PooledSpec(rule=TopKSpec(count=5)))
    assert_close("all five", given(spec, q, k, v), softmax(q, k, v), 1e-12)


@pytest.mark.parametrize("tile", [(99, 99, 99), (1, 99, 1), (3, 5, 8)], ids=str)
def test_a_tile_larger_than_the_grid_is_the_grid(tile: tuple[int, ...]) -> None:
    """Cut to the grid on every axis, exactly: one tile is full attention, rows of it attend alone."""
    q, k, v = (noise(i, 1, 105, 2, 8, scale=2.0) for i in range(3))
    spec = BlockSparseSpec(order=TilesSpec(tile=tile), selector=BandSpec(width=0))
    found = given(spec, q, k, v, grid=(3, 5, 7))
    if tile[2] > 1:
        assert_close("the whole grid", found, softmax(q, k, v), 1e-12)
        return
    columns = torch.arange(105).reshape(3, 5, 7)
    for t in range(3):
        for w in range(7):
            own = columns[t, :, w]
            assert_close("a column", found[:, own], softmax(q[:, own], k[:, own], v[:, own]), 1e-12)


def test_more_than_all_frames_is_all_frames() -> None:
    q, k, v = (noise(i, 1, 105, 2, 8, scale=2.0) for i in range(3))
    spec = BlockSparseSpec(order=RasterSpec(block=8), selector=SinkSpec(frames=50))
    assert_close("every frame", given(spec, q, k, v, grid=(3, 5, 7)), softmax(q, k, v), 1e-12)


@pytest.mark.parametrize("segment", [Segment("text", 5, rows="pattern"), Segment("text", 5, keys="compete")], ids=str)
def test_selectors_by_place_have_no_answer_for_extra_tokens_that_follow_or_compete(segment: Segment) -> None:
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(3, 5, 7), extra=(segment,))
    for selector in (BandSpec(), UnionSpec(of=(PooledSpec(), SinkSpec()))):
        (problem,) = BlockSparseSpec(selector=selector).problems(site)
        assert problem.path == "selector"
        assert "'text'" in problem.rule
        assert "rows: dense and keys: always" in str(problem.fix)
    assert BlockSparseSpec(selector=PooledSpec()).problems(site) == []


def test_a_gate_of_hidden_states_has_none_for_extra_rows() -> None:
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(3, 5, 7), extra=(Segment("text", 5, rows="pattern"),))
    (problem,) = BlockSparseSpec(far=CoarseSpec()).problems(site)
    assert (problem.path, "gate: none" in str(problem.fix)) == ("far.gate", True)
    assert BlockSparseSpec(far=CoarseSpec(gate="none")).problems(site) == []


@pytest.mark.parametrize("kernel", ["sdpa", "math", "flash_attn"])
def test_a_kernel_that_takes_no_lists_is_a_problem_before_the_call(kernel: str) -> None:
    spec = BlockSparseSpec(order=RasterSpec(block=8), kernel=kernel)
    (problem,) = spec.problems(Site(dim=16, heads=2, head_dim=8, grid=Grid(3, 5, 7)))
    assert problem.path == "kernel"
    assert problem.rule == f"{kernel!r} can never run for this design: takes no block_map"
    assert "use auto, gathered" in problem.fix


@pytest.mark.parametrize(("count", "fix"), [(3, "use 1 or 3 for"), (5, "use 1, 3, or 5 for")])
def test_a_window_s_fix_names_no_size_twice(count: int, fix: str) -> None:
    spec = BlockSparseSpec(order=TilesSpec(tile=(1, 2, 2)), selector=SlidingSpec(window=(2, 1, 1)))
    (problem,) = spec.problems(Site(dim=16, heads=2, head_dim=8, grid=Grid(count, 4, 4)))
    assert problem.fix == f"{fix} the whole axis"


def test_a_kernel_without_lse_is_no_good_for_a_joint_softmax() -> None:
    spec = BlockSparseSpec(order=RasterSpec(block=8), far=MeanSpec(), kernel="flex")
    q, k, v = (noise(i, 1, 40, 2, 16).requires_grad_() for i in range(3))
    with pytest.raises(KernelError, match=r"flex: .*does not return lse"):
        given(spec, q, k, v)


@pytest.mark.parametrize(
    ("name", "policy", "path", "fix"),
    [
        ("video_sparse", {"rows": "pattern"}, "far.gate", "gate: none"),
        ("radial", {"keys": "compete"}, "selector", "rows: dense and keys: always"),
        ("radial", {"rows": "pattern"}, "selector", "rows: dense and keys: always"),
        ("block_sparse", {"rows": "pattern"}, "", ""),
    ],
)
def test_policies_of_extra_tokens_are_checked_at_the_call(
    name: str, policy: dict[str, Any], path: str, fix: str
) -> None:
    """They come with the call, after every other check."""
    options: dict[str, Any] = {"block": 16} if name == "radial" else {}
    module = ultrazoo.create_attention(name, dim=16, heads=2, **options)
    extra = Extra(*(torch.randn(1, 5, 2, 8) for _ in range(3)), segments=(Segment("text", 5, **policy),))
    x = torch.randn(1, 105, 16)
    if not path:
        assert all(z.isfinite().all() for z in module(x, (3, 5, 7), extra=extra))
        return
    with pytest.raises(SiteError) as caught:
        module(x, (3, 5, 7), extra=extra)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert fix in problem.fix
