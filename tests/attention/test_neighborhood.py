"""Neighbourhoods: what they equal at special settings, output for output; dilation and causal time; published densities; refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention.calls import same_weights
from tests.attention.raw import GivenHost
from ultrazoo.attention.axes import AxesSpec
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.contract import Call
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.neighborhood import NeighborhoodSpec
from ultrazoo.attention.parts.layouts import StridedSpec, WindowsSpec
from ultrazoo.attention.sliding_tile import SlidingTileSpec
from ultrazoo.attention.swin import SwinSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=16, heads=2, head_dim=8, grid=Grid(4, 6, 8), rope=Rope(axes=(4, 2, 2)), qk_norm=True)


def scenario(spec: AttentionSpec, site: Site = SITE) -> Scenario:
    return Scenario(Example(spec, site, "neighborhood"), torch.float64)


def one_branch(layout: StridedSpec | WindowsSpec) -> BranchedSpec:
    return BranchedSpec(branches={"only": BranchSpec(layout=layout)})


EQUAL: dict[str, tuple[NeighborhoodSpec, AttentionSpec]] = {
    "stride = kernel: windows": (
        NeighborhoodSpec(kernel_size=(2, 3, 4), stride=(2, 3, 4)),
        one_branch(WindowsSpec(size=(2, 3, 4))),
    ),
    "Swin without its shift": (
        NeighborhoodSpec(kernel_size=(4, 2, 4), stride=(4, 2, 4)),
        SwinSpec(window=(4, 2, 4), bias=False),
    ),
    "stride = tile: sliding tiles": (
        NeighborhoodSpec(kernel_size=(2, 6, 6), stride=(2, 2, 2)),
        SlidingTileSpec(tile=(2, 2, 2), window=(1, 3, 3)),
    ),
    "dilation = length / kernel: MaxViT's grid": (
        NeighborhoodSpec(kernel_size=(4, 3, 2), dilation=(1, 2, 4)),
        one_branch(StridedSpec(counts=(1, 2, 4))),
    ),
    "kernel = axis": (NeighborhoodSpec(kernel_size=(4, 6, 8)), FullSpec()),
    "kernel = axis, strided": (NeighborhoodSpec(kernel_size=(4, 6, 8), stride=(2, 3, 8)), FullSpec()),
    "all axes full": (NeighborhoodSpec(kernel_size="full"), FullSpec()),
    "one axis full, the others one": (NeighborhoodSpec(kernel_size=(1, 1, "full")), AxesSpec(axes=("w",))),
    "time alone": (NeighborhoodSpec(kernel_size=("full", 1, 1)), AxesSpec(axes=("hw", "t"))),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equals_another_design_output_for_output(name: str) -> None:
    """The equivalences of GNA, as actual outputs from one host and one input."""
    spec, other = EQUAL[name]
    # Latte's odd layers are time; Swin's even ones are not shifted
    one = scenario(spec, SITE.at(layer=1 if name == "time alone" else 0, layers=2))
    with torch.no_grad():
        got, expected = one.run(), same_weights(other, one)
        assert_close(name, got, expected, EXACT)
        shrunk = dataclasses.replace(spec, kernel_size=(1, 1, 1), stride=1, dilation=1)
        assert error_ratio(same_weights(shrunk, one), expected) > 0.1


def inward(token: int, length: int, kernel: int) -> range:
    """The classical neighbourhood: as many keys as the kernel, shifted inwards at borders."""
    first = min(max(token - kernel // 2, 0), length - kernel)
    return range(first, first + kernel)


@pytest.mark.parametrize("kernel", [(3, 5, 3), (2, 4, 6), (1, 3, 1)], ids=str)
def test_stride_one_is_the_classical_neighbourhood(kernel: tuple[int, int, int]) -> None:
    """Query by query: softmax over its own box, as NATTEN's first paper has it."""
    grid = Grid(3, 5, 7)
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(1, *grid, 2, 8, dtype=torch.float64) for _ in range(3))
    expected = torch.empty_like(q)
    for t, h, w in np.ndindex(*grid):
        box = [torch.tensor(list(inward(p, n, s))) for p, n, s in zip((t, h, w), grid, kernel, strict=True)]
        keys, values = (z[0][box[0]][:, box[1]][:, :, box[2]].flatten(0, 2) for z in (k, v))
        weights = (torch.einsum("hd,nhd->hn", q[0, t, h, w], keys) / 8**0.5).softmax(-1)
        expected[0, t, h, w] = torch.einsum("hn,nhd->hd", weights, values)
    y = run_given(NeighborhoodSpec(kernel_size=kernel), grid, q, k, v)
    assert_close(str(kernel), y, expected, EXACT)
    assert error_ratio(run_given(NeighborhoodSpec(kernel_size="full"), grid, q, k, v), expected) > 0.1


def run_given(spec: NeighborhoodSpec, grid: Grid, *qkv: torch.Tensor) -> torch.Tensor:
    """The attention of q, k, v (B, T, H, W, heads, D) as they are."""
    heads, dim = qkv[0].shape[-2:]
    module = spec.build(Site(dim=heads * dim, heads=heads, head_dim=dim, grid=grid)).double()
    x = torch.cat([z.flatten(4).flatten(1, 3) for z in qkv], dim=-1)
    y: torch.Tensor = module(x, GivenHost(heads), Call(grid=tuple(grid)))  # type: ignore[arg-type]
    return y.reshape(qkv[0].shape)


@pytest.mark.parametrize("stride", [1, 2])
def test_dilation_is_the_same_attention_of_every_residue_class(stride: int) -> None:
    """Tokens two rows and three columns apart, each class by itself; 5 and 8 are no multiples of 2 and 3."""
    grid = Grid(2, 5, 8)
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, *grid, 2, 8, dtype=torch.float64) for _ in range(3))
    strides = (1, stride, stride)
    y = run_given(NeighborhoodSpec(kernel_size=(2, 2, 2), stride=strides, dilation=(1, 2, 3)), grid, q, k, v)
    expected = torch.empty_like(y)
    plain = NeighborhoodSpec(kernel_size=(2, 2, 2), stride=strides)
    for a in range(2):
        for b in range(3):
            part = [z[:, :, a::2, b::3] for z in (q, k, v)]
            expected[:, :, a::2, b::3] = run_given(plain, Grid(*part[0].shape[1:4]), *part)
    assert_close("dilated", y, expected, EXACT)
    assert error_ratio(run_given(plain, grid, q, k, v), expected) > 0.1


def test_causal_time_does_not_see_later_frames() -> None:
    spec = NeighborhoodSpec(kernel_size=(3, 3, 3), causal=True)
    one = scenario(spec, SITE.at(grid=Grid(5, 4, 5)))
    frame = 4 * 5
    with torch.no_grad():
        before = one.run()
        for changed in range(5):
            x = one.x.clone()
            x[:, changed * frame : (changed + 1) * frame] += 1
            moved = [
                bool((one.run(x) - before)[:, at * frame : (at + 1) * frame].abs().max() > 1e-9) for at in range(5)
            ]
            # a frame, and the two after it: the kernel is three
            assert moved == [changed <= at < changed + 3 for at in range(5)]


def test_causal_full_time_equals_growing_clips() -> None:
    """Frame f of the causal attention is the last frame of full attention over the first f + 1 frames."""
    grid = Grid(4, 2, 3)
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, *grid, 2, 8, dtype=torch.float64) for _ in range(3))
    y = run_given(NeighborhoodSpec(kernel_size="full", causal=True), grid, q, k, v)
    for f in range(4):
        clip = [z[:, : f + 1] for z in (q, k, v)]
        last = run_given(NeighborhoodSpec(kernel_size="full"), Grid(f + 1, 2, 3), *clip)[:, -1]
        assert_close(f"frame {f}", y[:, f], last, EXACT)
    assert error_ratio(run_given(NeighborhoodSpec(kernel_size="full"), grid, q, k, v)[:, 0], y[:, 0]) > 0.1


def test_causal_strides_reach_back_from_the_last_frame_of_their_group() -> None:
    seen = NeighborhoodSpec(kernel_size=(3, 1, 1), stride=(2, 1, 1), causal=True).visible(SITE.at(grid=Grid(6, 1, 1)))
    keys = [np.flatnonzero(row).tolist() for row in seen[0]]
    assert keys == [[0], [0, 1], [1, 2], [1, 2, 3], [3, 4], [3, 4, 5]]


@pytest.mark.parametrize("causal", [False, True])
def test_an_image_is_a_setting_and_causality_changes_nothing_there(causal: bool) -> None:
    image = SITE.at(grid=Grid(1, 6, 8))
    one = scenario(NeighborhoodSpec(kernel_size=3), image)
    with torch.no_grad():
        got = same_weights(NeighborhoodSpec(kernel_size=(1, 3, 3), causal=causal), one)
        assert_close("T = 1", got, one.run(), EXACT)
        short = NeighborhoodSpec(kernel_size=(3, 3, 3), causal=causal, short="whole")
        assert_close("short: whole", same_weights(short, one), one.run(), EXACT)
    # a kernel over time that has no time to look at is refused, not cut
    assert refused(NeighborhoodSpec(kernel_size=(3, 3, 3), causal=causal), image) == [
        ("kernel_size", "3 along t is more than the 1 tokens there", "use 1, full, or short: whole")
    ]


def test_the_last_block_of_a_ragged_axis_borrows_from_its_neighbour() -> None:
    """Always the kernel's keys, no padding, and so not symmetric: seven tokens in blocks of three."""
    seen = NeighborhoodSpec(kernel_size=(1, 1, 3), stride=(1, 1, 3)).visible(SITE.at(grid=Grid(1, 1, 7)))[0]
    assert [np.flatnonzero(row).tolist() for row in seen] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3 + [[4, 5, 6]]
    assert (seen != seen.T).any()
    windows = SwinSpec(window=(1, 1, 3), bias=False).expand(SITE.at(grid=Grid(1, 1, 7)))
    assert (windows.visible(SITE.at(grid=Grid(1, 1, 7)))[0] != seen).any()


def test_shifted_windows_are_no_neighbourhood() -> None:
    """Swin's odd layers: windows at the border are smaller, a neighbourhood is of one size everywhere."""
    site = SITE.at(grid=Grid(1, 8, 8), layer=1, layers=2)
    counts = SwinSpec(window=(1, 4, 4), bias=False).expand(site).visible(site)[0].sum(1)
    assert set(counts.tolist()) == {4, 8, 16}
    assert set(NeighborhoodSpec(kernel_size=4, stride=4).visible(site)[0].sum(1).tolist()) == {16}


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "share"),
    [
        # HunyuanVideo, FLUX at 4K (arXiv 2504.16922), and the examples of the specification
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), 0.090),
        ((1, 256, 256), 80, 16, 0.0977),
        ((21, 68, 120), (18, 24, 24), 1, 0.0605),
        ((21, 68, 120), (21, 16, 16), 1, 0.0314),
    ],
    ids=str,
)
def test_published_densities(grid: tuple[int, int, int], kernel: Any, stride: Any, share: float) -> None:
    site = SITE.at(grid=Grid(*grid))
    spec = NeighborhoodSpec(kernel_size=kernel, stride=stride)
    assert spec.problems(site) == []
    cost = spec.cost(site)
    assert cost.pairs / site.tokens**2 == pytest.approx(share, abs=0.00005)
    some = spec.visible(site, [0, site.tokens // 3, site.tokens - 1])[0]
    assert (some.sum(1) == cost.pairs // site.tokens).all()


def test_a_stride_of_the_tile_wastes_nothing() -> None:
    """Published windows and strides: what is visited is what is seen; a sliding window visits more."""
    site = SITE.at(grid=Grid(32, 48, 80))
    strided = NeighborhoodSpec(kernel_size=(16, 24, 24), stride=(16, 8, 8)).cost(site)
    assert strided.visited_pairs == strided.pairs
    sliding = NeighborhoodSpec(kernel_size=(16, 24, 24)).cost(site)
    assert sliding.pairs == strided.pairs
    assert sliding.visited_pairs is not None
    assert sliding.pairs < sliding.visited_pairs < site.tokens**2 / 2


def refused(spec: NeighborhoodSpec, site: Site = SITE) -> list[tuple[str, str, str]]:
    found = [(problem.path, problem.rule, problem.fix or "") for problem in spec.problems(site)]
    if found:
        with pytest.raises(SiteError):
            spec.build(site)
    return found


@pytest.mark.parametrize(
    ("options", "path", "rule", "fix"),
    [
        ({"kernel_size": (5, 3, 3)}, "kernel_size", "5 along t is more than the 4 tokens", "use 1 to 4, full"),
        ({"kernel_size": 7}, "kernel_size", "7 along h is more than the 6 tokens", "use 1 to 6, full"),
        ({"kernel_size": 3, "stride": (1, 1, 4)}, "stride", "4 along w is more than the kernel of 3", "use 1 to 3"),
        ({"kernel_size": (1, 3, 3), "stride": (2, 1, 1)}, "stride", "2 along t is more than the kernel of 1", "use 1"),
        (
            {"kernel_size": (2, 3, 3), "dilation": (1, 3, 1)},
            "dilation",
            "3 along h spreads 3 keys over 9 places, there are 6",
            "use 1 to 2, or a kernel of 1 to 2",
        ),
        ({"kernel_size": 1, "dilation": (1, 1, 9)}, "dilation", "9 along w spreads 1 keys", "use 1 to 8"),
        ({"kernel_size": (4, 6, 5), "dilation": (2, 1, 1)}, "dilation", "there are 4", "use 1, or a kernel of 1 to 2"),
        ({"kernel_size": ("full", 3, 3), "stride": (2, 1, 1)}, "stride", "all queries of a full axis", "use 1"),
        ({"kernel_size": ("full", 3, 3), "dilation": (2, 1, 1)}, "dilation", "a full axis leaves no key out", "use 1"),
        ({"kernel_size": (3,)}, "kernel_size", "got 1 values", "two for (H, W) or three for (T, H, W)"),
        ({"kernel_size": 3, "stride": (1, 1, 1, 1)}, "stride", "got 4 values", "three"),
        ({"kernel_size": 3, "kernel": "nobodys"}, "kernel", "nobodys", ""),
    ],
    ids=str,
)
def test_bad_sizes_are_refused_with_what_is_legal(options: dict[str, Any], path: str, rule: str, fix: str) -> None:
    found = refused(NeighborhoodSpec(**options))
    assert [one[0] for one in found] == [path]
    assert rule in found[0][1]
    assert fix in found[0][2]


@pytest.mark.parametrize("kernel", ["flash_attn", "xformers"])
def test_a_kernel_without_bias_is_refused_where_tiles_have_masks(kernel: str) -> None:
    found = refused(NeighborhoodSpec(kernel_size=3, kernel=kernel))
    assert [path for path, _, _ in found] == ["kernel"]
    assert found[0][1:] == (f"{kernel!r} can never run for this design: takes no bias", "use auto, sdpa, math")
    # the tiles of blocked windows need none, and a whole axis has none
    assert refused(NeighborhoodSpec(kernel_size=(1, 3, 4), stride=(1, 3, 4), kernel=kernel)) == []
    assert refused(NeighborhoodSpec(kernel_size="full", kernel=kernel)) == []
    assert refused(NeighborhoodSpec(kernel_size=3, kernel="math")) == []


def test_every_axis_tells_its_own_problem() -> None:
    found = refused(NeighborhoodSpec(kernel_size=(9, 9, 9), stride=(1, 1, 1)))
    assert [rule.split(" is")[0] for _, rule, _ in found] == ["9 along t", "9 along h", "9 along w"]


def test_legal_values_of_the_messages_are_legal() -> None:
    """The largest dilation, stride and kernel that the messages name are accepted, the next are not."""
    for kernel, stride, dilation in (((4, 6, 8), 1, 1), ((2, 3, 3), (2, 3, 3), 1), ((2, 3, 4), 1, (2, 2, 2))):
        assert refused(NeighborhoodSpec(kernel_size=kernel, stride=stride, dilation=dilation)) == []
    assert refused(NeighborhoodSpec(kernel_size=(2, 3, 4), dilation=(2, 2, 3))) != []


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "kernel_size"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": "whole"}, "kernel_size"),
        ({"kernel_size": [3, -1, 3]}, "kernel_size"),
        ({"kernel_size": 3, "stride": 0}, "stride"),
        ({"kernel_size": 3, "dilation": 1.5}, "dilation"),
        ({"kernel_size": 3, "causal": "t"}, "causal"),
        ({"kernel_size": 3, "short": "pad"}, "short"),
        ({"kernel_size": 3, "scale": 0}, "scale"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], path: str) -> None:
    spec, problems = parse_part("attention", {"name": "neighborhood", **options})
    assert spec is None
    assert problems[0].path == path
