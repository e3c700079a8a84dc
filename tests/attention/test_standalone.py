"""`create_attention`, `visible` and scheduled layers, as a notebook would use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ultrazoo
from ultrazoo.attention.contract import Call
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.scheduled import Scheduled
from ultrazoo.attention.standalone import PlainHost, create_attention, reset_parameters, visible
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.errors import SiteError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import error_ratio


def test_an_attention_of_its_own() -> None:
    module = create_attention("ultragen", dim=48, heads=4, windows=2, rank=4)
    x = torch.randn(2, 2 * 9 * 7, 48)
    y = module(x, (2, 9, 7), timestep=torch.tensor([3.0, 900.0]))
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert ultrazoo.create_attention is create_attention


def test_the_same_seed_gives_the_same_module() -> None:
    one, two, other = (create_attention("full", dim=16, heads=2, seed=seed) for seed in (1, 1, 2))
    x = torch.randn(1, 6, 16)
    assert torch.equal(one(x, (1, 2, 3)), two(x, (1, 2, 3)))
    assert not torch.equal(one(x, (1, 2, 3)), other(x, (1, 2, 3)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "full", "dim": 10, "heads": 3}, "3 heads do not divide dim 10"),
        ({"name": "branched", "dim": 8, "heads": 2, "branchs": {}}, "did you mean 'branches'"),
        ({"name": "ultragen", "dim": 8, "heads": 2, "windows": 3}, "even number"),
        ({"name": "ful", "dim": 8, "heads": 2}, "did you mean 'full'"),
    ],
)
def test_mistakes_are_explained(arguments: dict[str, object], words: str) -> None:
    with pytest.raises((SiteError, UsageError), match=words):
        create_attention(**arguments)


def test_a_size_that_does_not_work_is_an_error_when_called() -> None:
    module = create_attention("branched", dim=8, heads=2, branches={"a": {"layout": {"name": "windows", "counts": 4}}})
    assert module(torch.randn(1, 16, 8), (1, 4, 4)).shape == (1, 16, 8)
    with pytest.raises(SiteError, match="4 windows do not fit 3 rows"):
        module(torch.randn(1, 12, 8), (1, 3, 4))
    with pytest.raises(UsageError, match="N = 16"):
        module(torch.randn(1, 15, 8), (1, 4, 4))


def test_visible_of_windows() -> None:
    seen = visible("branched", (1, 4, 4), branches={"a": {"layout": {"name": "windows", "counts": 2}}}, queries=[0, 15])
    assert seen.shape == (1, 2, 16)
    assert seen[0, 0].nonzero()[0].tolist() == [0, 1, 4, 5]
    assert seen[0, 1].nonzero()[0].tolist() == [10, 11, 14, 15]


def test_a_scheduled_layer_asks_for_its_step() -> None:
    site = Site(dim=24, heads=3, head_dim=8, grid=Grid(2, 5, 6), rope=Rope((4, 2, 2)))
    layer = Scheduled(UltraGenSpec(windows=2, rank=2), [(0, 2, FullSpec())], site)
    host = PlainHost(site)
    for module in (layer, host):
        reset_parameters(module)
    x, t = torch.randn(1, 60, 24), torch.tensor([9.0])
    with pytest.raises(UsageError, match=r"model.select\(step, num_steps\)"):
        layer(x, host, Call(grid=(2, 5, 6), timestep=t))
    early = layer(x, host, Call(grid=(2, 5, 6), timestep=t, step=(2, 10)))
    late = layer(x, host, Call(grid=(2, 5, 6), timestep=t, step=(3, 10)))
    assert torch.equal(early, FullSpec().build(site)(x, host, Call(grid=(2, 5, 6))))
    assert error_ratio(early, late) > 1e-3


def test_own_projections_start_as_the_hosts() -> None:
    module = create_attention("branched", dim=16, heads=2, branches={"a": {"adapt": "own"}})
    x = torch.randn(1, 12, 16)
    full = FullSpec().build(module.site.at(grid=Grid(1, 3, 4)))
    assert error_ratio(module(x, (1, 3, 4)), full(x, module.host, Call(grid=(1, 3, 4)))) < 1e-6


def test_coinciding_branches_are_computed_once() -> None:
    branches = {
        "near": {"layout": {"name": "windows", "size": [1, 0, 0]}},
        "far": {"layout": {"name": "strided", "counts": [3, 1, 1]}},
    }
    module = create_attention("branched", dim=8, heads=1, branches=branches)
    x = torch.randn(1, 3 * 4, 8)
    with ultrazoo.kernels.record() as runs:
        module(x, (3, 2, 2))
    assert len(runs) == 1
    site = module.site.at(grid=Grid(3, 2, 2))
    assert module.spec.cost(site).pairs == 3 * 4 * 4
    assert [row.pairs for row in module.spec.cost(site).branches] == [48, 0]


def test_a_problem_is_told_once() -> None:
    """A spec that stands for itself is checked once, a named composition before its parts."""
    for name, options in (("cross_shaped", {}), ("axes", {"axes": ["x"]}), ("ultragen", {"windows": 3})):
        with pytest.raises(SiteError) as caught:
            create_attention(name, dim=8, heads=1, **options)
        assert len(caught.value.problems) == 1, name
    with pytest.raises(SiteError) as caught:
        ultrazoo.visible("t3", (3, 4, 5), table="wan_5b_4k")
    assert [problem.path for problem in caught.value.problems] == ["table"]


def test_options_are_checked_at_the_grid_that_is_given() -> None:
    """Neither refused for another grid's sake nor let through to the first call."""
    even = {"dim": 16, "heads": 2, "tile": (2, 2, 2), "window": (2, 2, 2)}
    module = create_attention("sliding_tile", **even, grid=(3, 4, 4))
    assert module.site.grid == Grid(3, 4, 4)
    full = FullSpec().build(module.site)
    x = torch.randn(1, 48, 16)
    assert error_ratio(module(x, (3, 4, 4)), full(x, module.host, Call(grid=(3, 4, 4)))) < 1e-6
    with pytest.raises(SiteError, match=r"at grid \(9, 12, 12\)") as caught:
        create_attention("sliding_tile", **even, grid=(9, 12, 12))
    assert "an even window of 2 tiles" in str(caught.value)
    with pytest.raises(SiteError, match=r"at grid \(3, 5, 7\)"):
        create_attention("radial", dim=16, heads=2, grid=(3, 5, 7))
    with pytest.raises(SiteError, match="100 of 1 key blocks"):
        create_attention(
            "block_sparse",
            dim=16,
            heads=2,
            selector={"name": "pooled", "rule": {"name": "topk", "count": 100}},
            grid=(5, 7),
        )


def test_without_a_grid_only_what_no_grid_allows_is_refused() -> None:
    module = create_attention("sliding_tile", dim=16, heads=2, tile=(2, 2, 2), window=(2, 2, 2))
    assert module(torch.randn(1, 48, 16), (3, 4, 4)).isfinite().all()
    with pytest.raises(SiteError, match="an even window of 2 tiles"):
        module(torch.randn(1, 9 * 144, 16), (9, 12, 12))
    with pytest.raises(SiteError, match=r"attention 't3': 1 problem"):
        create_attention("t3", dim=16, heads=2, table="wan_5b_4k", counts=2)


@pytest.mark.parametrize("grid", [(3, 4), [3, 4], (1, 3, 4)], ids=str)
def test_a_grid_of_two_numbers_is_an_image(grid: tuple[int, ...]) -> None:
    module = create_attention("full", dim=16, heads=2)
    assert torch.equal(module(torch.ones(1, 12, 16), grid), module(torch.ones(1, 12, 16), (1, 3, 4)))


def test_a_grid_of_two_numbers_is_an_image_in_a_graph_too() -> None:
    module = create_attention("full", dim=16, heads=2)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(1, 12, 16)
    assert error_ratio(compiled(x, (3, 4)), module(x, (1, 3, 4))) < 1e-6


@pytest.mark.parametrize("grid", [(3,), (1, 2, 3, 4), (0, 3, 4), (-1, 3, 4), (1.5, 3, 4), 7, None, "ab"], ids=str)
def test_what_is_no_grid_is_told(grid: Any) -> None:
    module = create_attention("full", dim=16, heads=2)
    for call in (lambda: module(torch.ones(1, 12, 16), grid), lambda: visible("full", grid)):
        with pytest.raises(UsageError, match=r"a grid is \(H, W\) or \(T, H, W\) of positive integers"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim .*at least 1"),
        ({"dim": 16.0}, "dim .*whole number"),
        ({"heads": 0}, "heads .*at least 1"),
        ({"head_dim": -8}, "head_dim .*at least 1"),
        ({"layer": 3}, "layer 3 does not exist; layers are 0-0"),
        ({"layers": 0}, "layers .*at least 1"),
        ({"rope": Rope(axes=(4, 2, 4))}, r"axes \(4, 2, 4\) of a head of 8 channels; .*at most 8"),
        ({"rope": Rope(axes=(3, 2, 2))}, "three even numbers"),
    ],
)
def test_a_place_that_cannot_be_is_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SiteError, match=words):
        create_attention("full", **{"dim": 16, "heads": 2, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queries": [12]}, "token indices 0-11 of grid .*got 12"),
        ({"queries": [0, -1]}, "got -1"),
        ({"queries": [1.5]}, "got 1.5"),
        ({"queries": [True]}, "got True"),
        ({"queries": 5}, r"in a list, got 5: write \[5\]"),
        ({"heads": 0}, "heads .*at least 1"),
        ({"layer": 2, "layers": 2}, "layer 2 does not exist"),
        ({"layer": -1}, "layer -1 does not exist"),
    ],
)
def test_visible_refuses_what_is_no_question(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        visible("full", (1, 3, 4), **options)
    assert visible("full", (3, 4), queries=[11, 0]).shape == (1, 2, 12)


def test_visible_of_everything_at_a_large_grid_asks_for_queries() -> None:
    with pytest.raises(UsageError, match="685440 queries of 685440 tokens are 438 GiB: give some tokens as queries"):
        visible("full", (21, 136, 240))
    assert visible("full", (21, 136, 240), queries=[5]).shape == (1, 1, 685440)


def test_an_input_that_is_no_tensor_is_told() -> None:
    module = create_attention("full", dim=16, heads=2)
    with pytest.raises(UsageError, match=r"x is a tensor \(B, N, C\), got ndarray"):
        module(np.zeros((1, 4, 16), np.float32), (1, 2, 2))


LSE = {"branches": {"a": {}, "b": {"layout": {"name": "windows", "counts": 2}}}, "fuse": {"name": "lse"}}


@pytest.mark.parametrize(
    ("name", "options", "kernel", "words"),
    [
        ("block_sparse", {}, "sdpa", "takes no block_map; use auto, gathered"),
        ("block_sparse", {}, "flash_attn", "takes no block_map"),
        ("block_sparse", {}, "by_key", "blocks of one query, they have up to"),
        (
            "block_sparse",
            {"order": {"name": "raster", "block": 64}},
            "flash_attn_4",
            "query blocks of 128 tokens alone",
        ),
        ("video_sparse", {}, "sdpa", "takes no block_map"),
        ("radial", {}, "xformers", "takes no block_map"),
        ("sol", {}, "math", "takes no block_map"),
        ("sla2", {"router": "soft"}, "gathered", "would never be asked"),
        ("sparse_videogen", {}, "sdpa", "takes no block_map"),
        ("full", {}, "gathered", "is for block maps only.*use auto, sdpa, math"),
        ("full", {}, "skip_softmax", "needs a threshold"),
        ("branched", LSE, "xformers", "does not return lse"),
        ("swin", {"window": 4, "bias": True}, "flash_attn", "takes no bias"),
        ("monarch", {}, "flash_attn", "takes no log_weight"),
        ("t3", {}, "flex", "is for block maps only"),
        (
            "by_head",
            {"groups": {"0": {"name": "full"}, "1": {"name": "radial", "kernel": "sdpa"}}},
            "",
            "takes no block_map",
        ),
    ],
)
def test_a_kernel_that_can_never_run_is_a_problem_before_the_call(
    name: str, options: dict[str, Any], kernel: str, words: str
) -> None:
    forced = {"kernel": kernel} if kernel else {}
    with pytest.raises(SiteError, match=f"kernel .*{words}"):
        create_attention(name, dim=16, heads=2, **options, **forced)


def test_a_kernel_that_may_run_is_left_to_the_call() -> None:
    for name, kernel in (
        ("full", "flash_attn"),
        ("block_sparse", "flash_attn_4"),
        ("branched", "xformers"),
        ("sol", "flex"),
    ):
        options: dict[str, Any] = {"branches": {"a": {}}} if name == "branched" else {}
        assert create_attention(name, dim=16, heads=2, kernel=kernel, **options).spec.kernel == kernel


def test_a_rope_that_is_no_rotary_embedding_is_an_option() -> None:
    assert create_attention("linear", dim=16, heads=2, rope="numerator").spec.rope == "numerator"
    with pytest.raises(SiteError, match=r"rope .*unknown option of attention 'full'"):
        create_attention("full", dim=16, heads=2, rope=10000)
