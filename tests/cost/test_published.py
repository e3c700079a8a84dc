"""Published facts, priced with the real specs: Wan's grids, UltraGen, T3-Video, dense Wan at 4K."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tests.cost.fakes import Sampler
from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.layouts import StridedSpec, WindowsSpec
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.backbones.dit import DitSpec
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.cost import price
from ultrazoo.grid import Grid
from ultrazoo.spec import Video

WAN = WanSpec()
WAN_5B = WanSpec(**WanSpec.presets["ti2v_5b"])
UHD = Grid(21, 136, 240)
# every window count of UltraGen (4, 5 and, on 2 x 2 cells, 2, 3) divides H and W: the closed forms are exact
EVEN = Grid(2, 120, 240)
T3_WAN = [(21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6)]
T3_WAN_5B = [(21, 1, 1), (1, 17, 20), (1, 17, 6), (3, 4, 15), (7, 4, 8)]


def priced(attention, grid=UHD, backbone=WAN, **options):
    sites = backbone.sites(grid)
    expanded = [spec.expand(site) for spec, site in zip(attention, sites, strict=True)]
    return price(backbone, sites, expanded, grid=grid, written=attention, **options)


def t3(counts):
    near, far = BranchSpec(layout=WindowsSpec(counts=counts)), BranchSpec(layout=StridedSpec(counts=counts))
    return BranchedSpec(branches={"near": near, "far": far})


@pytest.mark.parametrize(
    ("backbone", "width", "height", "frames", "grid", "tokens"),
    [
        (WAN, 832, 480, 81, (21, 30, 52), 32_760),
        (WAN, 1280, 720, 81, (21, 45, 80), 75_600),
        (WAN, 1920, 1088, 81, (21, 68, 120), 171_360),
        (WAN, 3840, 2176, 81, (21, 136, 240), 685_440),
        (WAN, 3840, 2160, 29, (8, 135, 240), 259_200),
        (WAN_5B, 3840, 2176, 81, (21, 68, 120), 171_360),
    ],
)
def test_wan_grids(backbone, width, height, frames, grid, tokens):
    got, problems = backbone.grid(Video(width=width, height=height, frames=frames))
    assert problems == []
    assert tuple(got) == grid
    assert got.tokens == tokens


def test_wan_1_3b_has_its_published_parameters():
    assert priced([FullSpec()] * 30).totals.parameters == 1_418_996_800


def test_dense_wan_at_4k_is_86_6_pflop_of_attention():
    plan = priced([FullSpec()] * 30, sampling=Sampler(50, 5.0))
    assert plan.totals.attention_flops == 30 * 4 * 685_440**2 * 1536
    assert plan.totals.attention_flops / 1e15 == pytest.approx(86.6, abs=0.05)
    assert plan.totals.attention_speedup == 1
    # 43 299 TMAC of attention, 44 157 TMAC for the whole transformer (T3-Video's table; it leaves out the embeddings)
    assert plan.totals.attention_flops / 2e12 == pytest.approx(43_299, abs=1)
    assert plan.totals.flops / 2e12 == pytest.approx(44_157, rel=2e-3)
    assert plan.clip.flops == 100 * plan.totals.flops


@pytest.mark.parametrize(("grid", "share"), [((21, 136, 240), 0.02), ((21, 68, 120), 0.08), ((21, 30, 52), 0.41)])
def test_linear_layers_against_dense_attention(grid, share):
    totals = priced([FullSpec()] * 30, Grid(*grid)).totals
    rest = (totals.projection_flops + totals.other_flops) / totals.attention_flops
    assert rest == pytest.approx(share, abs=0.025)


def full_over(plan, layer, grid):
    return Fraction(grid.tokens**2, plan.layers[layer].pairs)


def test_ultragen_layers_where_everything_divides():
    plan = priced([UltraGenSpec()] * 30, EVEN)
    even = 1 / (Fraction(1, 16) + Fraction(1, 16) / 4 + Fraction(1, 4**4))
    odd = 1 / (Fraction(1, 25) + Fraction(1, 16) / 9 + Fraction(1, 4**4))
    assert full_over(plan, 0, EVEN) == even
    assert full_over(plan, 1, EVEN) == odd
    assert float(even) == pytest.approx(12.19, abs=0.005)
    assert float(odd) == pytest.approx(19.66, abs=0.006)
    assert plan.totals.attention_speedup == pytest.approx(float(2 / (1 / even + 1 / odd)))


def test_ultragen_at_4k():
    plan = priced([UltraGenSpec()] * 30)
    assert float(full_over(plan, 0, UHD)) == pytest.approx(12.19, abs=0.005)
    assert float(full_over(plan, 1, UHD)) == pytest.approx(19.66, abs=0.01)
    assert plan.totals.attention_speedup == pytest.approx(15.05, abs=0.005)
    assert {layer.written for layer in plan.layers} == {"ultragen"}
    assert {layer.attention for layer in plan.layers} == {"branched"}


def test_released_ultragen_keeps_six_full_layers():
    plan = priced([UltraGenSpec(variant="released")] * 30)
    assert plan.totals.attention_speedup == pytest.approx(3.95, abs=0.005)
    assert [layer.layer for layer in plan.layers if layer.attention == "full"] == [0, 1, 2, 27, 28, 29]
    assert all(layer.extra_parameters == 0 for layer in plan.layers if layer.attention == "full")


@pytest.mark.parametrize(
    ("backbone", "grid", "counts", "ratio"),
    [(WAN, UHD, T3_WAN, 43.0), (WAN_5B, Grid(21, 68, 120), T3_WAN_5B, 35.5)],
)
def test_t3_counting_both_layouts(backbone, grid, counts, ratio):
    """What T3-Video computes: near and far windows in every layer, layer 0's twice although they coincide."""
    layers = range(backbone.layers)
    full = sum(4 * grid.tokens**2 * site.inner for site in backbone.sites(grid))
    near = [BranchedSpec(branches={"near": BranchSpec(layout=WindowsSpec(counts=counts[i % 5]))}) for i in layers]
    far = [BranchedSpec(branches={"far": BranchSpec(layout=StridedSpec(counts=counts[i % 5]))}) for i in layers]
    both = sum(priced(specs, grid, backbone).totals.attention_flops for specs in (near, far))
    assert full / both == pytest.approx(ratio, abs=0.05)


def test_t3_with_coinciding_branches_once():
    plan = priced([t3(T3_WAN[i % 5]) for i in range(30)])
    assert plan.totals.attention_speedup == pytest.approx(72.8, abs=0.05)
    assert plan.totals.extra_parameters == 0


def test_t3_on_one_h20_is_predicted_within_a_fifth():
    """T3-Video reports 1 857 s for 50 forwards on one H20; it computes both branches everywhere."""
    plan = priced([t3(T3_WAN[i % 5]) for i in range(30)], sampling=Sampler(50))
    row = next(one for one in plan.seconds if one.gpu == "H20 96GB")
    twice = 72.84 / 43.0
    predicted = 50 * (row.attention * twice + row.linear + row.memory)
    assert predicted == pytest.approx(1857, rel=0.2)


def test_dit_xl_2_has_its_published_size():
    """118.6 GMAC at 256 pixels (arXiv:2212.09748, table 4); 675.1 M parameters with its table of 256 positions."""
    spec = DitSpec()
    plan = priced([FullSpec()] * spec.layers, Grid(1, 16, 16), spec)
    assert plan.totals.flops / 2e9 == pytest.approx(118.6, abs=0.05)
    assert plan.totals.parameters + 256 * 1152 == 675_129_632
