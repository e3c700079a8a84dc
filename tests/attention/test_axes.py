"""Attention along axes: published costs, who meets whom over layers, Latte's parity, images, wrong options."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ultrazoo.attention.axes import AxesSpec
from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
LATTE = AxesSpec(axes=("hw", "t"))
SITE = Site(dim=16, heads=2, head_dim=8, grid=Grid(4, 5, 3), layers=6)


def scenario(spec: AttentionSpec, site: Site = SITE) -> Scenario:
    return Scenario(Example(spec, site, "axes"), torch.float64)


def test_costs_are_the_published_ones() -> None:
    """T + H + W keys per query for the three axes, HW + T for a pair of Latte's layers: 0.12 % and 4.8 % at 1088p."""
    site = SITE.at(grid=Grid(21, 68, 120))
    tokens = site.tokens
    every = AxesSpec(mode="sum").cost(site)
    assert every.pairs == tokens * (21 + 68 + 120)
    assert every.pairs / tokens**2 == pytest.approx(0.0012, abs=0.00005)
    in_turn = [AxesSpec().cost(site.at(layer=layer)).pairs // tokens for layer in range(6)]
    assert in_turn == [21, 68, 120, 21, 68, 120]
    pair = [LATTE.cost(site.at(layer=layer)).pairs for layer in (0, 1)]
    assert pair == [tokens * 68 * 120, tokens * 21]
    assert sum(pair) / tokens**2 == pytest.approx(0.048, abs=0.0005)
    assert every.parameters == 0


def test_latte_takes_frames_on_even_layers_and_time_on_odd_ones() -> None:
    for layer in range(4):
        one = scenario(LATTE, SITE.at(layer=layer))
        host, x = one.runner.host, one.x
        q, k, v = (z.unflatten(-1, (2, 8)).unflatten(1, tuple(SITE.grid)) for z in host.project(x, "qkv"))
        if layer % 2:
            q, k, v = (z.flatten(2, 3).permute(0, 2, 3, 1, 4) for z in (q, k, v))  # (B, HW, heads, T, D)
            y = F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2, 4)
        else:
            q, k, v = (z.flatten(2, 3).transpose(2, 3) for z in (q, k, v))  # (B, T, heads, HW, D)
            y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        assert_close(f"layer {layer}", one.run(), host.out(y.flatten(1, 2).flatten(2)), EXACT)


@pytest.mark.parametrize(("spec", "layers"), [(AxesSpec(), 3), (LATTE, 2), (AxesSpec(mode="mean"), 3)], ids=str)
def test_every_token_reaches_every_other_after_one_round(spec: AxesSpec, layers: int) -> None:
    reached = np.eye(SITE.tokens, dtype=bool)
    for layer in range(layers):
        assert not reached.all()
        reached = spec.visible(SITE.at(layer=layer))[0].astype(int) @ reached.astype(int) > 0
    assert reached.all()


def test_the_sum_is_as_many_means_as_there_are_groups() -> None:
    both = scenario(AxesSpec(mode="sum")), scenario(AxesSpec(mode="mean"))
    for one in both:
        torch.nn.init.zeros_(one.runner.host.o.bias)
    with torch.no_grad():
        assert_close("sum", both[0].run(), 3 * both[1].run(both[0].x), EXACT)


def test_all_axes_in_one_group_are_full_attention() -> None:
    with torch.no_grad():
        full = scenario(FullSpec())
        assert_close("hwt", scenario(AxesSpec(axes=("hwt",))).run(full.x), full.run(), EXACT)
        apart = scenario(AxesSpec(axes=("hw",))).run(full.x)
        assert error_ratio(apart, full.run()) > 0.01


def test_time_on_an_image_passes_values_through() -> None:
    """T = 1: a token that sees itself alone gets its own value, for every image."""
    one = scenario(LATTE, SITE.at(grid=Grid(1, 5, 3), layer=1))
    host = one.runner.host
    with torch.no_grad():
        assert_close("W_o v", one.run(), host.out(host.project(one.x, "v")), EXACT)


def test_branches_that_coincide_are_computed_once() -> None:
    """A single column: along w a token sees itself, as along t on an image."""
    spec = AxesSpec(mode="mean").expand(SITE.at(grid=Grid(1, 5, 1)))
    assert isinstance(spec, BranchedSpec)
    shared = spec.distinct(SITE.at(grid=Grid(1, 5, 1)))
    assert shared == {"along_t": "along_t", "along_h": "along_h", "along_w": "along_t"}


def test_a_plan_at_4k_takes_no_time() -> None:
    site = SITE.at(grid=Grid(21, 136, 240), layers=30)
    start = time.perf_counter()
    for layer in range(30):
        at = site.at(layer=layer)
        spec = LATTE.expand(at)
        assert spec.problems(at) == []
        spec.cost(at)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("spec", "path", "said"),
    [
        (AxesSpec(axes=()), "axes", "there are none"),
        (AxesSpec(axes=("t", "x")), "axes.1", "no axis 'x'"),
        (AxesSpec(axes=("hh",)), "axes.0", "names an axis twice"),
        (AxesSpec(axes=("", "t")), "axes.0", "is empty"),
        (AxesSpec(axes=("T",)), "axes.0", "no axis 'T'"),
        (AxesSpec(axes=("hw", "t", "wh"), mode="sum"), "axes.2", "there already"),
        (AxesSpec(kernel="nobodys"), "kernel", "nobodys"),
    ],
    ids=str,
)
def test_wrong_groups_are_problems(spec: AxesSpec, path: str, said: str) -> None:
    found = spec.problems(SITE)
    assert [problem.path for problem in found] == [path]
    assert said in found[0].rule
    with pytest.raises(SiteError):
        spec.build(SITE)


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"axes": ("thw",)}, True),
        ({"axes": ("wth", "thw")}, True),
        ({"axes": ("thw", "hw")}, False),
        ({"axes": ("thw",), "mode": "sum"}, True),
    ],
    ids=str,
)
def test_all_axes_together_are_full_attention(options: dict[str, Any], exact: bool) -> None:
    traits = AxesSpec(**options).traits()
    assert (traits.exact_at_init, traits.start.kind == "exact") == (exact, exact)


def test_a_group_may_come_twice_in_turn() -> None:
    """Two layers of frames, then one of time."""
    spec = AxesSpec(axes=("hw", "hw", "t"))
    keys = [spec.cost(SITE.at(layer=layer)).pairs // SITE.tokens for layer in range(6)]
    assert keys == [15, 15, 4, 15, 15, 4]


@pytest.mark.parametrize(
    ("options", "path"), [({"axes": "hw"}, "axes"), ({"mode": "max"}, "mode"), ({"axes": [1]}, "axes.0")], ids=str
)
def test_wrong_options_are_named(options: dict[str, object], path: str) -> None:
    spec, problems = parse_part("attention", {"name": "axes", **options})
    assert spec is None
    assert problems[0].path == path


def test_every_small_size_runs() -> None:
    for grid in [(1, 1, 1), (1, 1, 4), (3, 1, 1), (2, 4, 1)]:
        for mode in ("alternate", "mean"):
            site = replace(SITE, grid=Grid(*grid), layer=1)
            with torch.no_grad():
                y = scenario(AxesSpec(mode=mode), site).run()  # type: ignore[arg-type]
            assert bool(torch.isfinite(y).all()), grid
