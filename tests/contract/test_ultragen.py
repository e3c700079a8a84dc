"""UltraGen at its published shape, K = 4: both variants at every kind of layer and size against the window-by-window oracle."""

from __future__ import annotations

import pytest
import torch

from tests.oracles.ultragen import ultragen
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import assert_close, error_ratio, null_answers
from ultrazoo.testing.scenario import Example, Scenario, pair_up

EXACT = 1e-10


def example(variant: str, layer: int, grid: tuple[int, int, int]) -> Example:
    # channels per axis in Wan's proportion, 44 to 42 to 42
    site = Site(
        dim=16, heads=2, head_dim=12, layer=layer, layers=30, grid=Grid(*grid), rope=Rope((4, 4, 4)), qk_norm=True
    )
    return Example(UltraGenSpec(variant=variant, rank=3), site, variant)  # type: ignore[arg-type]


# (T, H, W): both divide, neither does, ties of the nearest multiple (10 is between 8 and 12), an image
GRIDS = [(2, 20, 24), (2, 17, 19), (3, 10, 18), (1, 21, 16)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layer", [3, 4])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_block_equals_the_oracle(variant: str, layer: int, grid: tuple[int, int, int]) -> None:
    scenario = Scenario(example(variant, layer, grid), torch.float64)
    with torch.no_grad():
        got, expected = scenario.run(), ultragen(scenario.case())
    for name, one, reference in pair_up(got, expected):
        assert_close(name, one, reference, EXACT)
        for wrong, answer in null_answers(reference).items():
            assert error_ratio(answer, reference) > 1e3 * EXACT, wrong


@pytest.mark.parametrize("layer", [0, 2, 3, 26, 27, 29])
def test_outer_layers_of_the_released_variant_are_full_attention(layer: int) -> None:
    outer = layer in (0, 1, 2, 27, 28, 29)
    released = Scenario(example("released", layer, (1, 17, 19)), torch.float64)
    full = Scenario(Example(FullSpec(), released.site, "released"), torch.float64)
    assert (released.runner.attention.spec.name == "full") == outer
    with torch.no_grad():
        ratio = error_ratio(released.run(), full.run())
    assert (ratio < EXACT) == outer
    assert_close("oracle", released.run().detach(), ultragen(released.case()), EXACT)


def test_windows_are_as_many_as_the_paper_says() -> None:
    """Pairs of the local branch at a size that divides: N²/K² on even layers, N²/(K+1)² on odd ones."""
    for layer, (local, regional) in {4: (16, 4), 5: (25, 9)}.items():
        at = example("paper", layer, (1, 40, 40))
        rows = {branch.name: branch.pairs for branch in at.expanded.cost(at.site).branches}
        tokens = 1600
        assert rows["local"] == tokens**2 // local
        assert rows["global"] == (tokens // 16) ** 2
        if regional == 4:
            assert rows["regional"] == (tokens // 4) ** 2 // regional
