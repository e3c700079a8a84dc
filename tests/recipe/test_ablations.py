"""UltraGen's ablations: each recipe is the shipped design with the one change that its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipe.samples import resolved
from ultrazoo import recipe
from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.parts.adapt import SharedSpec
from ultrazoo.attention.parts.fuse import TimeGateSpec
from ultrazoo.attention.parts.shifts import NoShiftSpec, RollSpec

RECIPES = Path(__file__).parents[2] / "recipes"
# HD-FVD at 1080p; the whole design has 214.12
PUBLISHED = {"no_global": 328.98, "no_cross_window": 419.15, "no_regional": 376.49, "no_lora": 284.08, "swin": 458.93}
WHOLE = resolved("ultragen_1080p")


def expected(what: str) -> BranchedSpec:
    """The shipped design, changed by hand."""
    spec = WHOLE.attention[0]
    assert isinstance(spec, BranchedSpec)
    parts = dict(spec.branches)
    fuse = spec.fuse
    if what == "no_global":
        del parts["global"]
        fuse = TimeGateSpec(order=("local", "regional"))
    elif what == "no_cross_window":
        for name in ("local", "regional"):
            parts[name] = replace(parts[name], shift=NoShiftSpec())
    elif what == "no_lora":
        for name in ("regional", "global"):
            parts[name] = replace(parts[name], adapt=SharedSpec())
    else:
        del parts["regional"]
        fuse = TimeGateSpec(order=("global", "local"))
        if what == "swin":
            parts["local"] = replace(parts["local"], shift=RollSpec())
    return replace(spec, branches=parts, fuse=fuse)


def test_there_is_one_for_every_row_of_the_table() -> None:
    found = {path.stem.removeprefix("ultragen_ablation_") for path in RECIPES.glob("ultragen_ablation_*.yaml")}
    assert found == {*PUBLISHED, *(f"{what}_tiny" for what in PUBLISHED)}


@pytest.mark.parametrize("what", sorted(PUBLISHED))
def test_the_tiny_one_has_the_same_attention_and_sizes_of_its_own(what: str) -> None:
    one, toy = resolved(f"ultragen_ablation_{what}_tiny"), resolved("ultragen_tiny")
    assert all(spec == expected(what) for spec in one.attention)
    assert (one.grid, one.backbone, one.dtype) == (toy.grid, toy.backbone, toy.dtype)


@pytest.mark.parametrize("what", sorted(PUBLISHED))
def test_one_thing_differs_from_the_whole_design(what: str) -> None:
    one = resolved(f"ultragen_ablation_{what}")
    assert all(spec == expected(what) for spec in one.attention)
    assert one.attention[0] != WHOLE.attention[0]
    assert (one.grid, one.backbone, one.sampling, one.dtype) == (
        WHOLE.grid,
        WHOLE.backbone,
        WHOLE.sampling,
        WHOLE.dtype,
    )
    assert f"HD-FVD {PUBLISHED[what]} at 1080p" in (RECIPES / f"ultragen_ablation_{what}.yaml").read_text()


def test_what_each_costs() -> None:
    """Closed forms at sizes that nearly divide: 12.19 with even layers' windows everywhere, 1/16 + 1/256 without regional."""
    totals = {what: recipe.make_plan(resolved(f"ultragen_ablation_{what}")).totals for what in PUBLISHED}
    whole = recipe.make_plan(WHOLE).totals
    assert totals["no_cross_window"].attention_speedup == pytest.approx(12.19, abs=0.005)
    assert totals["no_lora"].attention_flops == whole.attention_flops
    lora = 2 * 3 * 2 * 64 * 1536
    assert whole.extra_parameters - totals["no_lora"].extra_parameters == 30 * lora
    even, odd = 1 / 16 + 1 / 256, 1 / 25 + 1 / 256
    assert totals["no_regional"].attention_speedup == pytest.approx(2 / (even + odd), rel=2e-3)
    # borders moved by half: five windows along each axis, those at the ends half as large
    halves = (3 + 2 * 0.25) / 16
    assert totals["swin"].attention_speedup == pytest.approx(2 / (even + halves**2 + 1 / 256), rel=2e-3)
