"""GPUs, fits and predicted seconds."""

from __future__ import annotations

import pytest

from tests.cost.fakes import Sampler, Share, Toy
from ultrazoo.cost import GPUS, gpu, price
from ultrazoo.cost.memory import GIB, ByMode, fits
from ultrazoo.errors import UsageError
from ultrazoo.grid import Grid


def wan_4k(**options):
    grid = Grid(21, 136, 240)
    backbone = Toy()
    return price(backbone, backbone.sites(grid), [Share()] * 30, grid=grid, **options)


def test_the_table_is_ordered_sourced_and_physical():
    assert [one.gib for one in GPUS] == sorted(one.gib for one in GPUS)
    assert len({one.name for one in GPUS}) == len(GPUS)
    for one in GPUS:
        assert one.attention_source
        assert one.matmul_source
        assert 0 < one.attention < 1
        assert 0 < one.matmul < 1
        assert one.tflops > one.tflops_fp32


def test_names_are_found_and_near_names_offered():
    assert gpu("h100 80gb").tflops == 989
    with pytest.raises(UsageError, match="did you mean 'H200'"):
        gpu("H20O")


def test_dense_4k_on_named_gpus_matches_published_runs():
    # 86.6 PFLOP of attention per forward, 100 forwards: 4.2 h at cuDNN's 576 TFLOP/s on one H100
    rows = {row.gpu: row for row in wan_4k(sampling=Sampler(50, 5.0)).seconds}
    assert 100 * rows["H100 80GB"].attention / 3600 == pytest.approx(4.2, rel=0.02)
    # T3-Video's dense run: 50 forwards of the whole transformer in 39 662 s on one H20
    single = {row.gpu: row for row in wan_4k(sampling=Sampler(50)).seconds}
    assert single["H20 96GB"].clip == pytest.approx(39662, rel=0.05)


def test_every_figure_carries_its_efficiencies():
    for row in wan_4k().seconds:
        one = gpu(row.gpu)
        assert row.attention_efficiency == one.attention
        assert row.matmul_efficiency == one.matmul
        assert f"{one.attention:.0%}".replace("%", " %") in row.assumed
        assert row.forward == pytest.approx(row.attention + row.linear + row.memory)
        assert row.clip is None


def test_fp32_runs_at_the_fp32_peak_and_float64_is_not_predicted():
    half, single = wan_4k(), wan_4k(dtype="float32")
    for a, b in zip(half.seconds, single.seconds, strict=True):
        assert b.attention > a.attention
    assert wan_4k(dtype="float64").seconds == ()


def test_fits_reserve_memory():
    exact = ByMode(int(79.6 * GIB), int(70 * GIB), int(20 * GIB))
    rows = {row.gpu: row for row in fits(exact)}
    assert not rows["H100 80GB"].infer
    assert rows["H100 80GB"].train
    assert rows["H200"].infer
    assert rows["RTX 4090"].train_checkpointed
    assert not rows["RTX 4090"].train
