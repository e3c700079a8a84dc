"""UltraGen's composition: which layers, which parts, which checks."""

from __future__ import annotations

import pytest

from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import Rope, Site

SITE = Site(dim=1536, heads=12, head_dim=128, layers=30, grid=Grid(21, 136, 240), rope=Rope((44, 42, 42)), qk_norm=True)


def test_released_keeps_the_outer_layers_full() -> None:
    names = [UltraGenSpec(variant="released").expand(SITE.at(layer=i)).name for i in range(30)]
    assert [i for i, name in enumerate(names) if name == "full"] == [0, 1, 2, 27, 28, 29]
    assert {UltraGenSpec().expand(SITE.at(layer=i)).name for i in range(30)} == {"branched"}


@pytest.mark.parametrize(
    ("layer", "local", "regional"), [(4, [34, 34, 34, 34], [34, 34]), (5, [28, 27, 27, 27, 27], [23, 23, 22])]
)
def test_windows_of_even_and_odd_layers(layer: int, local: list[int], regional: list[int]) -> None:
    spec = UltraGenSpec().expand(SITE)
    assert isinstance(spec, BranchedSpec)
    site = SITE.at(layer=layer)
    assert list(spec.branches["local"].place(site).q_cuts[1].sizes()) == local
    assert list(spec.branches["regional"].place(site).q_cuts[1].sizes()) == regional
    assert spec.branches["local"].place(site).q_cuts[0].whole


def test_the_coarsest_regional_windows_are_moved_too() -> None:
    """K/2 + 1 along H and W on odd layers, also where K/2 is one; time stays whole."""
    site = SITE.at(grid=Grid(1, 12, 12))
    for windows in (2, 4):
        for layer in (0, 1):
            spec = UltraGenSpec(windows=windows).expand(site)
            assert isinstance(spec, BranchedSpec)
            (pairs,) = (row.pairs for row in spec.cost(site.at(layer=layer)).branches if row.name == "regional")
            assert pairs == 36 * 36 // (windows // 2 + layer) ** 2
            assert spec.branches["regional"].place(site.at(layer=layer)).q_cuts[0].whole


def test_a_ragged_released_size_is_resized_as_the_code_does() -> None:
    # 3840x2160, 29 frames: grid (8, 135, 240); 135 rows → 136 for four windows, 67 → 68 for two of the halved map
    spec = UltraGenSpec(variant="released").expand(SITE.at(layer=4, grid=Grid(8, 135, 240)))
    assert isinstance(spec, BranchedSpec)
    site = SITE.at(layer=4, grid=Grid(8, 135, 240))
    assert spec.branches["local"].place(site).q_grid == (8, 136, 240)
    assert spec.branches["regional"].place(site).coarse_q == (8, 67, 120)
    assert spec.branches["regional"].place(site).q_grid == (8, 66, 120)
    assert spec.branches["global"].place(site).q_grid == (8, 33, 60)


def test_an_odd_number_of_windows_is_refused() -> None:
    with pytest.raises(SiteError, match="use an even number"):
        UltraGenSpec(windows=3).build(SITE)
    assert UltraGenSpec(windows=3).problems(SITE)[0].path == "windows"


def test_options_come_from_plain_data() -> None:
    spec, problems = parse_part("attention", {"name": "ultragen", "variant": "released", "windows": 2})
    assert not problems
    assert spec == UltraGenSpec(variant="released", windows=2)
