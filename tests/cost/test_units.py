"""Numbers for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrazoo.cost import units


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (units.flops(86.6e15), "86.6 PFLOP"),
        (units.flops(0), "0 FLOP"),
        (units.flops(999.96e12), "1.00 PFLOP"),
        (units.params(1418996800), "1.42 G"),
        (units.params(12), "12"),
        (units.count(685440), "685 440"),
        (units.gib(2**31), "2 GiB"),
        (units.gib(3 * 2**19), "1.50 MiB"),
        (units.duration(0.0000421), "42.1 µs"),
        (units.duration(0.5), "500 ms"),
        (units.duration(12.345), "12.3 s"),
        (units.duration(200), "3 min 20 s"),
        (units.duration(15035), "4 h 11 min"),
        (units.duration(3 * 86400), "3 d 0 h"),
        (units.ratio(12.19), "12.19×"),
        (units.ratio(None), "–"),
        (units.percent(0.0046), "0.46 %"),
        (units.percent(0.58), "58 %"),
        (units.percent(1), "100 %"),
        (units.layer_list([0, 1, 2, 27, 28, 29]), "0-2, 27-29"),
        (units.layer_list(range(0, 30, 2)), "0-28/2"),
        (units.layer_list([4]), "4"),
        (units.layer_list([1, 5]), "1, 5"),
    ],
)
def test_rendering(got, want):
    assert got == want


@given(st.sets(st.integers(0, 60), min_size=1))
def test_a_layer_list_reads_back_to_the_same_layers(layers):
    back = set()
    for part in units.layer_list(tuple(layers)).split(", "):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        back |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    assert back == layers
