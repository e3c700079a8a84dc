"""Rolling-window attention: the public contract suite, and what is special about it."""

from __future__ import annotations

import pytest
from ultrazoo_rolling.oracle import rolling
from ultrazoo_rolling.rolling import RollingSpec
from ultrazoo_rolling.spans import Span, spans

from ultrazoo import plan, visible
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import contract_suite

TestRolling = contract_suite("longvideo/rolling", oracle=rolling)


def test_spans_of_a_streamed_video():
    assert list(spans(11, chunk=3, window=3, sinks=1, ahead=0)) == [
        Span(0, 3, 0, 0, 3),
        Span(3, 6, 0, 0, 6),
        Span(6, 9, 1, 3, 9),
        Span(9, 11, 1, 6, 11),
    ]


@pytest.mark.parametrize("frames", [1, 2, 5, 12, 31])
@pytest.mark.parametrize("options", [(1, 0, 0, 0), (3, 6, 3, 0), (2, 3, 4, 0), (4, 2, 1, 3), (40, 1, 1, 1)])
def test_spans_partition_the_frames_and_are_causal(frames, options):
    chunk, _, _, ahead = options
    found = list(spans(frames, *options))
    assert [frame for span in found for frame in range(span.first, span.last)] == list(range(frames))
    for span in found:
        seen = [frame for frame in range(frames) if span.sees(frame)]
        assert len(seen) == span.frames
        assert max(seen) < min(frames, span.first + chunk + ahead)
        assert set(range(span.first, span.last)) <= set(seen)


def test_nothing_flows_back_in_time():
    grid = Grid(9, 2, 2)
    seen = visible("longvideo/rolling", grid, chunk=3, window=3, sinks=1)[0]
    frame = [token // 4 for token in range(grid.tokens)]
    for query in range(grid.tokens):
        newest = (frame[query] // 3 + 1) * 3
        assert not seen[query, newest * 4 :].any()


def test_cost_per_frame_stops_growing():
    def pairs(frames: int) -> int:
        return RollingSpec().cost(Site(64, 2, 32, grid=Grid(frames, 4, 4))).pairs

    assert pairs(303) - pairs(300) == pairs(33) - pairs(30)
    # 3 new frames see 3 sinks, 6 frames of past and themselves
    assert pairs(33) - pairs(30) == 3 * 12 * 16 * 16


def test_one_chunk_is_full_attention():
    site = Site(64, 2, 32, grid=Grid(3, 4, 5))
    assert RollingSpec().cost(site).pairs == site.tokens**2
    assert RollingSpec().visible(site).all()


def test_shipped_recipe():
    made = plan("longvideo/wan_1_3b_rolling")
    assert {layer.attention for layer in made.layers} == {"longvideo/rolling"}
    assert made.totals.attention_speedup > 1.5
    assert made.resolved.plugins[0]["distribution"] == "ultrazoo-rolling"
