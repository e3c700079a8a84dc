"""The cost model against closed forms, on specs whose cost is known by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.cost.fakes import Range, Rows, Sampler, Share, Toy
from ultrazoo.cost import full_flops, price
from ultrazoo.cost.price import guided
from ultrazoo.grid import Grid

GRID = Grid(3, 5, 7)
N = GRID.tokens


def toy(attention=None, grid=GRID, **options):
    backbone = Toy(dim=8, heads=2, depth=3)
    sites = backbone.sites(grid)
    attention = attention or [Rows(), Share(divisor=5), Share()]
    return price(backbone, sites, attention, grid=grid, **options)


def test_layers_hold_the_counts_of_their_spec_and_the_rest_of_the_layer():
    first, second, third = toy().layers
    assert first.pairs == N * (35 + 7)
    assert first.attention_flops == 4 * first.pairs * 8
    assert first.projection_flops == 8 * N * 8 * 8
    assert first.other_flops == 11 + 16 * N * 64
    assert first.keys_per_query == 42
    assert [b.name for b in first.branches] == ["frame", "row"]
    assert first.start == "needs tuning (arXiv:0000.00000)"
    assert third.start == "exact"
    assert second.pairs == N * N // 5
    assert third.flops == third.attention_flops + third.projection_flops + third.other_flops


def test_totals_add_up_and_count_every_parameter():
    plan = toy()
    totals = plan.totals
    assert totals.attention_flops == sum(layer.attention_flops for layer in plan.layers)
    assert totals.other_flops == 1000 + sum(layer.other_flops for layer in plan.layers)
    assert totals.extra_parameters == 7
    assert totals.parameters == 3 * 12 * 64 + 7
    assert totals.weight_bytes == 2 * totals.parameters
    assert totals.attention_speedup == pytest.approx(3 * 4 * N * N * 8 / totals.attention_flops)
    assert totals.flops == totals.attention_flops + totals.projection_flops + totals.other_flops


def test_memory_follows_the_documented_formulas():
    plan = toy(dtype="float32")
    c, stream = 8, 2 * N * 8
    saved = [14 * N * c, 14 * N * c, 14 * N * c]
    peak = 9 * N * c
    got = plan.totals.activation_bytes
    assert got.infer == 4 * (stream + peak)
    assert got.train == 4 * (stream + sum(saved))
    assert got.train_checkpointed == 4 * (stream + 3 * N * c + 14 * N * c)
    assert plan.memory.infer == 4 * plan.totals.parameters + got.infer
    assert plan.memory.train == 16 * plan.totals.parameters + got.train
    half = toy(dtype="bfloat16")
    assert half.totals.activation_bytes.train == got.train // 2
    assert half.memory.train == 16 * plan.totals.parameters + got.train // 2


def test_a_clip_runs_each_steps_own_attention_and_doubles_for_guidance():
    dense = [Share()] * 3
    sparse = Share(divisor=5)
    base = toy(dense)
    per_layer = base.layers[0].attention_flops - toy([sparse] * 3).layers[0].attention_flops
    steps = [Range(2, 4, {0: sparse, 2: sparse})]
    plan = toy(dense, steps=steps, sampling=Sampler(10, 5.0))
    assert plan.clip.forwards == 20
    assert plan.clip.flops == 20 * base.totals.flops - 2 * 3 * 2 * per_layer
    assert toy(dense, steps=steps, sampling=Sampler(10)).clip.flops * 2 == plan.clip.flops
    # the layer map is what layers and totals show
    assert plan.totals == base.totals
    assert base.clip.forwards == 1
    assert base.clip.flops == base.totals.flops


def test_alternatives_own_parameters_and_memory():
    plan = toy([Share()] * 3, steps=[Range(0, 1, {1: Rows(extra=50)})], sampling=Sampler(4))
    assert [layer.extra_parameters for layer in plan.layers] == [0, 50, 0]
    assert plan.totals.parameters == 3 * 12 * 64 + 50


@pytest.mark.parametrize(("scale", "two"), [(None, False), (1.0, False), (0.0, False), (5.0, True), (0.5, True)])
def test_guidance_needs_two_forwards_unless_it_is_trivial(scale, two):
    assert guided(scale) is two


def test_speed_is_priced_by_visited_pairs():
    plain, blocks = toy([Share()] * 3), toy([Share(visited=2)] * 3)
    assert blocks.totals.attention_flops == plain.totals.attention_flops
    for a, b in zip(plain.seconds, blocks.seconds, strict=True):
        assert b.attention == pytest.approx(2 * a.attention)
        assert b.linear == pytest.approx(a.linear)


def test_extra_tokens_count_as_tokens_of_full_attention():
    from ultrazoo.spec import Segment

    site = Toy().sites(GRID)[0]
    joint = replace(site, extra=(Segment("text", 10),))
    assert full_flops(joint) == 4 * (N + 10) ** 2 * 1536


def test_plan_data_has_the_agreed_keys():
    plan = toy()
    assert set(plan.layers[0].data()) == {
        "layer", "attention", "pairs", "keys_per_query", "attention_flops", "projection_flops", "other_flops",
        "extra_parameters", "branches",
    }  # fmt: skip
    assert set(plan.totals.data()) == {
        "attention_flops", "projection_flops", "other_flops", "parameters", "extra_parameters", "attention_speedup",
        "weight_bytes", "activation_bytes",
    }  # fmt: skip
    assert set(plan.totals.activation_bytes.data()) == {"infer", "train", "train_checkpointed"}
    assert set(plan.clip.data()) == {"forwards", "flops"}
    assert set(plan.fits[0].data()) == {"gpu", "gib", "infer", "train", "train_checkpointed"}


def test_the_cost_room_imports_no_torch():
    code = "import sys, ultrazoo.cost; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
