"""MonarchRT: published cost, exact cases, sub-tiling, chunks, tokens that are not real, sizes that do not divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ultrazoo
from tests.oracles.monarch import monarch as oracle
from ultrazoo.attention import monarch as module
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.monarch import MonarchSpec
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.options import parse_part
from ultrazoo.spec import Rope, Segment, Site
from ultrazoo.testing import assert_close, dense, error_ratio
from ultrazoo.testing.scenario import Example, Scenario, pair_up

SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 4, 6), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
WAN = Site(dim=1536, heads=12, head_dim=128, layers=30, rope=Rope((44, 42, 42)), qk_norm=True)


def scenario_of(spec: MonarchSpec, site: Site = SITE, **options: Any) -> Scenario:
    return Scenario(Example(spec, site, "one"), torch.float64, **options)


def against_the_oracle(spec: MonarchSpec, site: Site = SITE, **options: Any) -> None:
    scenario = scenario_of(spec, site, **options)
    with torch.no_grad():
        for name, got, expected in pair_up(scenario.run(), oracle(scenario.case())):
            assert_close(name, got, expected, 1e-10)


@pytest.mark.parametrize(
    ("grid", "share"), [(Grid(21, 30, 52), 0.069), (Grid(21, 45, 80), 0.046), (Grid(21, 68, 120), 0.030)], ids=str
)
def test_published_cost(grid: Grid, share: float) -> None:
    """1.5/H + 1/W of full attention: three multiply-adds along rows, for two that both have across them."""
    site = WAN.at(grid=grid)
    ratio = MonarchSpec().cost(site).attention_flops / FullSpec().cost(site).attention_flops
    assert ratio == pytest.approx(share, abs=0.0005)
    assert ratio == pytest.approx(1.5 / grid.h + 1 / grid.w, rel=1e-12)


@pytest.mark.parametrize(("f_tied", "h_reduce", "w_reduce"), [(3, 1, 1), (1, 2, 1), (1, 1, 4), (7, 3, 2)])
def test_sub_tiling_changes_the_sides_of_the_factors(f_tied: int, h_reduce: int, w_reduce: int) -> None:
    site = WAN.at(grid=Grid(21, 30, 52))
    spec = MonarchSpec(f_tied=f_tied, h_reduce=h_reduce, w_reduce=w_reduce)
    ratio = spec.cost(site).attention_flops / FullSpec().cost(site).attention_flops
    assert ratio == pytest.approx(1.5 / (30 / h_reduce * f_tied) + w_reduce / 52, rel=1e-12)
    assert spec.problems(site) == []


@pytest.mark.parametrize("grid", [Grid(3, 1, 7), Grid(3, 5, 1), Grid(4, 1, 1), Grid(1, 1, 6), Grid(1, 6, 1)], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("extra", [False, True], ids=["", "extra"])
def test_exact_where_height_or_width_is_one(grid: Grid, iterations: int, extra: bool) -> None:
    scenario = scenario_of(MonarchSpec(iterations=iterations), SITE.at(grid=grid), extra=extra, key_valid=True)
    with torch.no_grad():
        for name, got, expected in pair_up(scenario.run(), dense(scenario.case())):
            real = scenario.key_valid if got.shape[1] == grid.tokens else slice(None)
            assert_close(name, got[real], expected[real], 1e-12)


def test_not_exact_otherwise_and_iterations_matter() -> None:
    answers = []
    for iterations in (1, 2):
        scenario = scenario_of(MonarchSpec(iterations=iterations))
        with torch.no_grad():
            answers.append(scenario.run())
            assert error_ratio(answers[-1], dense(scenario.case())) > 0.05
    assert error_ratio(*answers) > 1e-3


def test_weights_add_up_to_one() -> None:
    """Whatever the scores, values that are all the same come out as they are."""
    for spec in (MonarchSpec(), MonarchSpec(iterations=2, h_reduce=2), MonarchSpec(f_tied=3, w_reduce=3)):
        scenario = scenario_of(spec, extra=False)
        host = scenario.runner.host
        with torch.no_grad():
            host.v.weight.zero_()
            expected = host.o(host.v.bias).expand_as(scenario.x)
            assert_close("output", scenario.run(), expected, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"f_tied": 3},
        {"h_reduce": 2},
        {"h_reduce": 4},
        {"w_reduce": 3},
        {"f_tied": 3, "h_reduce": 2, "w_reduce": 2},
        {"w_reduce": 6, "h_reduce": 4, "iterations": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("holes", [False, True], ids=["", "holes"])
def test_sub_tiling(options: dict[str, int], holes: bool) -> None:
    spec = MonarchSpec(**options)  # type: ignore[arg-type]
    scenario = scenario_of(spec, extra=True, key_valid=holes)
    with torch.no_grad():
        for name, got, expected in pair_up(scenario.run(), oracle(scenario.case())):
            assert_close(name, got, expected, 1e-10)


@pytest.mark.parametrize("grid", [Grid(1, 4, 5), Grid(1, 1, 1), Grid(2, 1, 1), Grid(1, 2, 9), Grid(5, 3, 2)], ids=str)
def test_images_and_small_grids(grid: Grid) -> None:
    for iterations in (1, 2):
        against_the_oracle(MonarchSpec(iterations=iterations), SITE.at(grid=grid), extra=True)


@pytest.mark.parametrize("frames", [1, 2, 5], ids=lambda n: f"{n}-frames")
def test_one_tile_per_column_is_full_attention(frames: int) -> None:
    """Strips of one column leave nothing to average along rows."""
    scenario = scenario_of(MonarchSpec(w_reduce=6), SITE.at(grid=Grid(frames, 4, 6)))
    with torch.no_grad():
        assert_close("output", scenario.run(), dense(scenario.case()), 1e-12)


def shrink(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, columns: int) -> int:
    """Let only so many query columns be computed at a time; the bytes that it takes."""
    spec: Any = scenario.example.spec
    frames, rows, _ = spec.cube(scenario.grid)
    one = module.COPIES * scenario.x.shape[0] * scenario.site.inner * scenario.x.element_size() * frames * rows
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", columns * one)
    return columns * one


@pytest.mark.parametrize("columns", [1, 4, 6, 12])
@pytest.mark.parametrize("options", [{}, {"iterations": 2}, {"h_reduce": 2, "w_reduce": 2}], ids=str)
def test_chunks_change_nothing(columns: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = scenario_of(MonarchSpec(**options), extra=True, key_valid=True)  # type: ignore[arg-type]
    with torch.no_grad(), record() as whole:
        expected = scenario.run()
    limit = shrink(monkeypatch, scenario, columns)
    with torch.no_grad(), record() as runs:
        got = scenario.run()
    for name, one, other in pair_up(got, expected):
        assert_close(name, one, other, 1e-13)
    assert len(runs) > len(whole)
    assert sum(run.pairs for run in runs) == sum(run.pairs for run in whole)
    # the looks of R and the means that L reads; the last call is that of the extra rows
    made = [2 * torch.Size(run.q).numel() * 8 for run in runs[:-1]]
    assert max(made) <= limit


@pytest.mark.parametrize("columns", [2, 6])
def test_gradients_through_chunks(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = scenario_of(MonarchSpec(iterations=2))

    def gradients() -> list[torch.Tensor]:
        scenario.runner.zero_grad()
        x = scenario.x.detach().clone().requires_grad_()
        scenario.run(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in scenario.runner.host.parameters())]  # type: ignore[list-item]

    expected = gradients()
    shrink(monkeypatch, scenario, columns)
    for i, (one, other) in enumerate(zip(gradients(), expected, strict=True)):
        if float(other.norm()) > 1e-8:
            assert_close(f"gradient {i}", one, other, 1e-11)


def test_rows_and_columns_without_a_real_token() -> None:
    for iterations in (1, 2):
        scenario = scenario_of(MonarchSpec(iterations=iterations))
        valid = torch.ones(2, *SITE.grid, dtype=torch.bool)
        valid[0, 1] = False
        valid[0, 2, 3] = False
        valid[1, :, :, 2] = False
        scenario.key_valid = valid.flatten(1)
        x = scenario.x.requires_grad_()
        got, expected = scenario.run(), oracle(scenario.case())
        assert_close("valid rows", got[scenario.key_valid], expected[scenario.key_valid], 1e-10)
        got[scenario.key_valid].square().sum().backward()
        assert bool(x.grad.isfinite().all())
        assert not bool(x.grad[~scenario.key_valid].any())


def test_inside_a_group_of_heads() -> None:
    site = SITE.at(qk_norm=False)
    mixed = ByHeadSpec(groups={"0,2": MonarchSpec(), "1": FullSpec()})
    scenario = Scenario(Example(mixed, site, "mixed"), torch.float64)
    case = scenario.case()
    # heads add up in the output projection: undo it, which is square here, to put each attention's own side by side
    weight, bias = case.host.weights["o.weight"], case.host.weights["o.bias"]
    with torch.no_grad():
        own, full = oracle(replace(case, spec=MonarchSpec())), dense(case)
        heads, others = (torch.linalg.solve(weight, (y - bias).mT).mT for y in (own, full))
        heads[..., 8:16] = others[..., 8:16]
        assert_close("output", scenario.run(), case.host.out(heads), 1e-9)


RAGGED: list[tuple[dict[str, int], tuple[int, int, int]]] = [
    ({"h_reduce": 3}, (2, 5, 4)),
    ({"w_reduce": 2}, (1, 3, 7)),
    ({"f_tied": 2}, (3, 4, 5)),
    ({"f_tied": 4, "h_reduce": 2, "w_reduce": 3}, (5, 3, 7)),
    ({"f_tied": 9, "h_reduce": 9, "w_reduce": 9}, (2, 3, 4)),
    ({"h_reduce": 4, "iterations": 2}, (2, 5, 3)),
    ({"f_tied": 2, "w_reduce": 4, "iterations": 3}, (3, 3, 5)),
]


@pytest.mark.parametrize(("options", "grid"), RAGGED, ids=str)
@pytest.mark.parametrize("holes", [False, True], ids=["", "holes"])
def test_sizes_that_do_not_divide(options: dict[str, int], grid: tuple[int, int, int], holes: bool) -> None:
    """The last tile of an axis is shorter; what it lacks is never seen, and pairs are counted as they are computed."""
    spec, site = MonarchSpec(**options), SITE.at(grid=Grid(*grid))  # type: ignore[arg-type]
    assert spec.problems(site) == []
    scenario = scenario_of(spec, site, extra=True, key_valid=holes)
    with torch.no_grad(), record() as runs:
        got = scenario.run()
    for name, one, expected in pair_up(got, oracle(scenario.case())):
        real = scenario.key_valid if holes and one.shape[1] == site.tokens else slice(None)
        assert_close(name, one[real], expected[real], 1e-10)
    counted = sum(run.pairs for run in runs)
    assert scenario.extra is not None
    with_text = site.at(extra=(Segment("text", scenario.extra.k.shape[1]),))
    assert counted == 2 * site.heads * spec.cost(with_text).pairs


def test_gradients_at_sizes_that_do_not_divide() -> None:
    scenario = scenario_of(MonarchSpec(f_tied=2, h_reduce=3, w_reduce=4, iterations=2), SITE.at(grid=Grid(3, 4, 5)))
    case = scenario.case(requires_grad=True)
    oracle(case).square().sum().backward()  # type: ignore[union-attr]
    x = scenario.x.detach().clone().requires_grad_()
    scenario.run(x).square().sum().backward()
    assert x.grad is not None
    assert case.x.grad is not None
    assert_close("x", x.grad, case.x.grad, 1e-9)


def test_tiles_of_sizes_that_do_not_divide() -> None:
    """5 rows in 4 bands are three bands of at most 2; more bands than rows are rows; a lone frame is tied to none."""
    spec = MonarchSpec(f_tied=3, h_reduce=4, w_reduce=9)
    assert spec.tiles((1, 5, 4)) == ((1, 3, 4), (1, 2, 1))
    assert spec.cube((1, 5, 4)) == (12, 2, 1)
    assert spec.tiles((7, 8, 18)) == ((3, 4, 9), (3, 2, 2))


def test_a_number_that_divides_no_common_size_can_be_made_and_called() -> None:
    """Sizes come with each call: nothing is refused at the size that stands for them all."""
    made = ultrazoo.create_attention("monarch", dim=16, heads=2, h_reduce=3, w_reduce=5, f_tied=7)
    for grid in ((7, 6, 10), (4, 5, 7)):
        x = torch.randn(1, grid[0] * grid[1] * grid[2], 16)
        with torch.no_grad():
            assert bool(made(x, grid).isfinite().all())


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"iterations": 0}, "iterations"),
        ({"h_reduce": 0}, "h_reduce"),
        ({"w_reduce": -1}, "w_reduce"),
        ({"f_tied": 1.5}, "f_tied"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], path: str) -> None:
    _, problems = parse_part("attention", {"name": "monarch", **options})
    assert [problem.path for problem in problems] == [path]


def test_plans_at_four_thousand_pixels_are_cheap_and_say_what_memory_it_takes() -> None:
    site = WAN.at(grid=Grid(21, 136, 240), extra=(Segment("text", 512),))
    cost = MonarchSpec(iterations=2).cost(site)
    assert cost.pairs < 0.05 * FullSpec().cost(site).pairs
    # beside the stream no more than one chunk of a gibibyte, not frames times tokens
    assert cost.peak_elements < 5.1 * site.tokens * site.width + (1 << 29)
    assert cost.saved_elements < 10 * site.tokens * site.width


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_a_sample_without_a_real_token_is_finite_and_leaves_the_others_alone(iterations: int) -> None:
    attention = ultrazoo.create_attention("monarch", dim=24, heads=3, iterations=iterations)
    x, valid = 3 * torch.randn(2, 24, 24), torch.rand(2, 24) > 0.3
    valid[0] = False
    both = attention(x, (2, 3, 4), key_valid=valid)
    assert both.isfinite().all()
    alone = attention(x[1:], (2, 3, 4), key_valid=valid[1:])
    assert error_ratio(both[1:][valid[1:]], alone[valid[1:]]) < 1e-5
