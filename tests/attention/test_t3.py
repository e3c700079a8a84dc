"""T3-Video: published tables and counts, the rule for other sizes, branches computed once, wrong sizes and options."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracles.t3 import EXTENTS as AIMED
from tests.oracles.t3 import TABLES as PUBLISHED
from tests.oracles.t3 import ruled, t3
from tests.recipe.samples import problems_of, resolved, small
from ultrazoo import recipe
from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.contract import export_form
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.about import AboutSpec, windows_for
from ultrazoo.attention.t3 import T3Spec
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.errors import SiteError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.ports import EXPORTS
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=16, heads=2, head_dim=8, grid=Grid(4, 6, 8), layers=5, rope=Rope(axes=(4, 2, 2)))
UHD, UHD_5B = Grid(21, 136, 240), Grid(21, 68, 120)
WAN, WAN_5B = WanSpec(), WanSpec(**WanSpec.presets["ti2v_5b"])


def pieces(spec: T3Spec, site: Site) -> dict[str, tuple[int, int, int]]:
    """Windows per axis of each branch."""
    expanded = spec.expand(site)
    assert isinstance(expanded, BranchedSpec)
    cuts = {name: branch.place(site).q_cuts for name, branch in expanded.branches.items()}
    return {name: (t.windows, h.windows, w.windows) for name, (t, h, w) in cuts.items()}


@pytest.mark.parametrize(
    ("table", "backbone", "grid", "both", "once"),
    [("wan_1_3b_4k", WAN, UHD, 43.0, 72.8), ("auto", WAN, UHD, 43.0, 72.8), ("wan_5b_4k", WAN_5B, UHD_5B, 35.5, 53.7)],
)
def test_published_savings(table: str, backbone: WanSpec, grid: Grid, both: float, once: float) -> None:
    """Over 30 layers: 43.0 (35.5) times less attention with both branches of every layer, 72.8 (53.7) with equal ones once."""
    spec = T3Spec(table=table)  # type: ignore[arg-type]
    full = separate = priced = 0
    for site in backbone.sites(grid):
        expanded = spec.expand(site)
        assert isinstance(expanded, BranchedSpec)
        full += FullSpec().cost(site).attention_flops
        priced += spec.cost(site).attention_flops
        for name, branch in expanded.branches.items():
            separate += BranchedSpec(branches={name: branch}).cost(site).attention_flops
        assert spec.cost(site).parameters == 0
    assert full / separate == pytest.approx(both, abs=0.05)
    assert full / priced == pytest.approx(once, abs=0.05)


def test_published_multiply_adds() -> None:
    """43 299 TMAC of full attention become 1 007 TMAC when both branches are counted everywhere."""
    sites = WAN.sites(UHD)
    both = sum(2 * 2 * site.tokens**2 * 1536 / math.prod(PUBLISHED["wan_1_3b_4k"][site.layer % 5]) for site in sites)
    assert both / 1e12 == pytest.approx(1007, abs=0.5)
    closing = [T3Spec(table="wan_1_3b_4k").cost(site) for site in sites]
    single = [layer for layer, cost in enumerate(closing) if cost.branches[1].pairs == 0]
    assert single == [0, 5, 10, 15, 20, 25]
    counted = sum(cost.attention_flops * (2 if layer in single else 1) / 2 for layer, cost in enumerate(closing))
    assert counted == pytest.approx(both)


@pytest.mark.parametrize(("table", "grid"), [("wan_1_3b_4k", UHD), ("wan_5b_4k", UHD_5B)])
def test_published_tables(table: str, grid: Grid) -> None:
    spec = T3Spec(table=table)  # type: ignore[arg-type]
    for layer in range(10):
        counts = PUBLISHED[table][layer % 5]
        site = SITE.at(grid=grid, layer=layer)
        assert pieces(spec, site) == {"close": counts, "remote": counts}
        expanded = spec.expand(site)
        assert isinstance(expanded, BranchedSpec)
        place = expanded.branches["close"].place(site)
        assert all(len(cut.runs) == 1 for cut in place.q_cuts), "a published table divides its grid"


def test_the_rule_gives_the_first_table_at_its_grid() -> None:
    for layer in range(5):
        at = SITE.at(grid=UHD, layer=layer)
        assert pieces(T3Spec(), at)["close"] == PUBLISHED["wan_1_3b_4k"][layer]


@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        ((21, 68, 120), [(21, 1, 1), (1, 17, 15), (1, 4, 20), (3, 17, 4), (7, 4, 3)]),
        ((21, 135, 240), [(21, 1, 1), (1, 15, 30), (1, 9, 40), (3, 15, 8), (7, 9, 6)]),
        ((1, 45, 80), [(1, 1, 1), (1, 5, 10), (1, 3, 16), (1, 5, 2), (1, 3, 2)]),
        # 47, 83 and 13 are prime: uneven windows, but 13 frames are within a factor of two of 7
        ((13, 47, 83), [(13, 1, 1), (1, 6, 10), (1, 3, 14), (1, 6, 3), (4, 3, 2)]),
        ((2, 3, 5), [(2, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)]),
    ],
    ids=str,
)
def test_the_rule_at_other_sizes(grid: tuple[int, int, int], counts: list[tuple[int, int, int]]) -> None:
    got = [pieces(T3Spec(), SITE.at(grid=Grid(*grid), layer=layer)) for layer in range(5)]
    assert [one["close"] for one in got] == counts
    assert [one["remote"] for one in got] == counts


def test_the_rule_keeps_its_word_for_every_length() -> None:
    """A divisor within a factor of two and no better one, or the nearest number of windows; the oracle finds the same."""
    uneven = 0
    for wanted in sorted({int(n) for row in AIMED for n in row if n != math.inf}):
        for length in range(1, 260):
            count = windows_for(length, wanted)
            assert count == ruled(length, wanted)
            assert 1 <= count <= length
            if length % count:
                uneven += 1
                assert abs(length / wanted - count) <= 0.5
            else:
                assert length / count <= 2 * wanted
    assert uneven > 100


def test_a_block_built_at_one_size_follows_its_rule_at_another() -> None:
    """The number of windows is chosen at the call, not when the block was built."""
    small_site = SITE.at(grid=Grid(3, 5, 7), layer=1)
    built = Scenario(Example(T3Spec(), small_site, "t3"), torch.float64)
    other = Scenario(Example(T3Spec(), small_site, "t3"), torch.float64, grid=Grid(3, 17, 16))
    other.runner = built.runner
    with torch.no_grad():
        assert_close("(3, 17, 16)", other.run(), t3(other.case()), EXACT)


def test_frames_apart_and_images_are_attended_in_full() -> None:
    """Layer 0 keeps frames apart: on an image it is full attention, computed once."""
    image = Scenario(Example(T3Spec(), SITE.at(grid=Grid(1, 6, 8)), "t3"), torch.float64)
    full = Scenario(Example(FullSpec(), image.site, "t3"), torch.float64)
    with torch.no_grad():
        assert_close("image", image.run(full.x), full.run(), EXACT)
        video = Scenario(Example(T3Spec(), SITE, "t3"), torch.float64)
        assert error_ratio(video.run(), Scenario(Example(FullSpec(), SITE, "t3"), torch.float64).run(video.x)) > 0.01
    assert T3Spec().cost(SITE).pairs == 4 * 48**2


def test_uneven_sizes_are_balanced_windows() -> None:
    """2160 rows are 135 of tokens, which 17 does not divide: windows of 8 and 7, nothing padded or resized."""
    site = SITE.at(grid=Grid(21, 135, 240), layer=1)
    expanded = T3Spec(table="wan_1_3b_4k").expand(site)
    assert isinstance(expanded, BranchedSpec)
    for branch in expanded.branches.values():
        sizes = list(branch.place(site).q_cuts[1].sizes())
        assert sizes == [8] * 16 + [7]
        assert branch.place(site).q_grid == site.grid


@pytest.mark.parametrize(
    ("spec", "grid", "path", "said"),
    [
        (T3Spec(table="wan_1_3b_4k"), (8, 135, 240), "table", "21 windows do not fit 8 frames"),
        (T3Spec(table="wan_5b_4k"), (1, 68, 120), "table", "21 windows do not fit 1 frames"),
        (T3Spec(counts=(1, 9, 2)), (4, 6, 8), "counts", "9 windows do not fit 6 rows"),
        (T3Spec(counts=(2, 2), table="wan_5b_4k"), (21, 68, 120), "counts", "gives them too"),
        (T3Spec(counts=(1, 2, 3, 4)), (4, 6, 8), "counts", "got 4 numbers"),
        (T3Spec(kernel="nobodys"), (4, 6, 8), "kernel", "nobodys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_a_problem(spec: T3Spec, grid: tuple[int, int, int], path: str, said: str) -> None:
    site = SITE.at(grid=Grid(*grid))
    found = spec.problems(site)
    assert [problem.path for problem in found] == [path]
    assert said in str(found[0])
    assert spec.expand(site) is spec
    with pytest.raises(SiteError):
        spec.build(site)


@pytest.mark.parametrize(
    ("options", "path"), [({"counts": 0}, "counts"), ({"counts": [1, -2]}, "counts"), ({"table": "wan"}, "table")]
)
def test_wrong_options_are_named(options: dict[str, object], path: str) -> None:
    spec, problems = parse_part("attention", {"name": "t3", **options})
    assert spec is None
    assert problems[0].path == path


def test_a_cycle_of_counts_is_a_table_of_one_s_own() -> None:
    node = {"name": "t3", "counts": {"cycle": [[3, 1, 1], [1, 3, 2], [1, 9, 10]]}}
    plan = recipe.make_plan(resolved(small(attention={"*": node})))
    assert [layer.pairs for layer in plan.layers][:3] == [3 * 90**2, 2 * 270**2 // 6, 270 * 3]
    assert plan.layers[3].pairs == plan.layers[0].pairs
    wrong = problems_of(small(attention={"*": {"name": "t3", "counts": {"cycle": [[3, 1, 1], [1, 10, 2]]}}}))
    assert [problem.path for problem in wrong] == ["attention.*.counts.cycle.1"]


def test_what_the_rule_chooses_at_run_time_is_not_exported() -> None:
    for spec, told in ((T3Spec(), ()), (T3Spec(table="wan_5b_4k"), EXPORTS), (T3Spec(counts=2), EXPORTS)):
        assert spec.traits().export == told
    block: AttentionSpec = T3Spec().expand(SITE)
    with pytest.raises(UsageError, match="divisors of plain ints"), export_form(block.build(SITE), "pt2"):
        pass


def test_about_as_a_layout_of_any_branch() -> None:
    node = {"name": "branched", "branches": {"one": {"layout": {"name": "about", "size": [4, 5]}}}}
    assert problems_of(small(attention={"*": node})) == []
    assert AboutSpec(size=(4, 5)).counts(Grid(3, 9, 10)) == (1, 3, 2)
    node["branches"] = {"one": {"layout": {"name": "about", "size": [4, 5]}, "shift": {"name": "roll"}}}
    wrong = problems_of(small(attention={"*": node}))
    assert [problem.path for problem in wrong] == ["attention.*.branches.one.shift"]
    assert AboutSpec(size=(1, 2, 3, 4)).problems(SITE)[0].path == "size"
