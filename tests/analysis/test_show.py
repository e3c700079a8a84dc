"""Pictures, the text of `show`, and plans side by side."""

from __future__ import annotations

import io
import json
import struct

import pytest

from tests.analysis.plans import fake_plan
from tests.cost.fakes import Rows, Share
from ultrazoo.analysis import comparison, plot
from ultrazoo.analysis.show import cost_text, show
from ultrazoo.errors import OutputError, UsageError
from ultrazoo.grid import Grid


def pixels(content: bytes) -> tuple[int, int]:
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("grid", [Grid(3, 10, 14), Grid(1, 16, 16), Grid(21, 34, 20)])
def test_pictures_are_real_images_and_the_same_every_time(grid):
    shown = show(fake_plan(grid=grid))
    first, again = shown.images(), shown.images()
    assert first == again
    for content in first.values():
        assert content.startswith(b"\x89PNG")
        assert min(pixels(content)) > 200
    svg = shown.images("svg")["layers"]
    assert svg == shown.images("svg")["layers"]
    assert b"<svg" in svg


def test_pictures_are_not_blank():
    import matplotlib.image as mpimg

    content = show(fake_plan()).images()["influence"]
    values = mpimg.imread(io.BytesIO(content))
    assert values[..., :3].std() > 0.05
    rows, everything = (show(fake_plan(attention=(one,))).images()["blocks"] for one in (Rows(), Share()))
    assert rows != everything


def test_files_are_written_under_the_plans_name(tmp_path):
    files = show(fake_plan("vendor/toy")).save(tmp_path / "out")
    assert [file.name for file in files] == [
        "vendor_toy_influence.png",
        "vendor_toy_blocks.png",
        "vendor_toy_layers.png",
    ]
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        show(fake_plan()).save(tmp_path / "file" / "below")


def test_other_forms_and_queries_are_refused():
    with pytest.raises(UsageError, match="png or svg"):
        show(fake_plan()).images("pdf")
    with pytest.raises(UsageError, match="outside the grid"):
        show(fake_plan(), "9,0,0")


def test_pyplot_is_left_alone():
    import subprocess
    import sys

    code = (
        "import sys; from tests.analysis.plans import fake_plan; from ultrazoo.analysis.show import show;"
        "show(fake_plan()).images(); sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_data_is_json_with_counts():
    data = json.loads(json.dumps(show(fake_plan(), (1, 4, 5)).data()))
    assert data["query"] == [1, 4, 5]
    assert data["groups"][1]["branches"][1] == {
        "name": "row", "tokens": 14, "share": 14 / 420, "frames": [0, 14 / 140, 0],
    }  # fmt: skip
    assert len(data["layers"]) == 4


def test_cost_bars_are_proportional():
    lines = cost_text(show(fake_plan()).layers, width=100, unicode=False).splitlines()[1:]
    full, rows = (line.count("#") for line in lines[:2])
    assert full / rows == pytest.approx(420 / 154, rel=0.1)
    assert max(len(line) for line in lines) <= 100


def test_text_holds_maps_and_costs():
    drawn = show(fake_plan()).text(width=80)
    assert "layers 1, 3: test/rows" in drawn
    assert "FLOPs per layer" in drawn


def test_plans_side_by_side():
    plans = [fake_plan("dense", attention=(Share(),) * 4), fake_plan("sparse", attention=(Rows(),) * 4)]
    compared = comparison.compare(plans)
    rows = json.loads(json.dumps(comparison.rows(compared)))
    assert [row["name"] for row in rows] == ["dense", "sparse"]
    assert rows[0]["attention speedup"] == 1
    assert rows[1]["attention FLOPs"] == plans[1].totals.attention_flops
    assert rows[1]["start"] == {"needs tuning (arXiv:0000.00000)": [0, 1, 2, 3]}
    assert rows[0]["seconds"][0]["attention_efficiency"] == 0.9
    assert (rows[0]["visited share"], rows[1]["visited share"]) == (1, pytest.approx((140 + 14) / 420))
    assert rows[1]["peak in one attention"] == 2 * 5 * 420 * 8
    assert (rows[0]["coverage"]["layers"], rows[1]["coverage"]["layers"]) == (1, None)
    assert rows[1]["coverage"]["never_meet"]["share"] == pytest.approx(2 / 3)
    assert {"gpu", "infer"} <= set(rows[0]["fits"][0])
    printed = comparison.text(compared)
    assert "sparse" in printed
    assert "never (67 % apart)" in printed
    assert "after 1 layer every token can have influenced every other" in printed
    assert "H100 80GB: assumed attention 58 %" in printed
    assert "\x1b[" not in printed


def test_the_better_value_is_marked():
    marked = comparison._marked([3.0, 1.0, None], lambda v: str(v), "low")
    assert marked == ["3.0", "[bold]1.0[/bold]", "None"]
    assert comparison._marked([1, 1], str, "low") == ["1", "1"]


def test_what_a_kernel_visits_counts_as_visited():
    (one,) = comparison.compare([fake_plan(attention=(Share(divisor=4, visited=2),) * 4)])
    assert comparison.visited_share(one.plan) == 0.5


def test_plans_of_one_name_are_told_apart():
    names = [one.name for one in comparison.compare([fake_plan("a"), fake_plan("b"), fake_plan("a")])]
    assert names == ["a #1", "b", "a #2"]


def test_one_layer_can_be_looked_at_alone():
    shown = show(fake_plan(), layer=1)
    assert [group.layers for group in shown.groups] == [(1,)]
    assert [layer.layer for layer in shown.layers] == [1]
    assert list(shown.maps[0]) == ["frame", "row", "all"]
    # of the model, whose other layers see everything
    assert shown.coverage.layers == 2
    for layer in (-1, 4):
        with pytest.raises(UsageError, match=f"layer {layer} does not exist: toy has layers 0-3"):
            show(fake_plan(), layer=layer)


def test_the_plot_of_plans_is_an_image_and_the_same_every_time():
    plans = [fake_plan("dense", attention=(Share(),) * 4), fake_plan("sparse", attention=(Rows(),) * 4, sampling=None)]
    compared = comparison.compare(plans)
    content = plot.plot(compared)
    assert content == plot.plot(compared)
    assert content.startswith(b"\x89PNG")
    assert min(pixels(content)) > 200
    drawn = plot.plot(compared, "svg").decode()
    for words in ("dense", "starts needs tuning", "never (67 % apart)", "forward on H100 80GB", "runs on"):
        assert words in drawn, words
    assert "≈" not in drawn
    # bars are as long as their numbers
    panel = next(one for one in plot.panels(compared) if one.title == "visited share of full")
    assert [panel.value(one) for one in compared] == [1, pytest.approx(154 / 420)]


def test_clips_and_forwards_are_not_ranked_together():
    clips = [fake_plan("a"), fake_plan("b", attention=(Rows(),) * 4)]
    mixed = [clips[0], fake_plan("b", attention=(Rows(),) * 4, sampling=None)]
    for plans, title, what in ((clips, "clip", "clip"), (mixed, "forward", "forward")):
        compared = comparison.compare(plans)
        panel = plot.panels(compared)[-1]
        assert panel.title == f"{title} on H100 80GB"
        rows = [next(row for row in one.plan.seconds if row.gpu == "H100 80GB") for one in compared]
        assert [panel.value(one) for one in compared] == [getattr(row, what) for row in rows]


def test_pairs_of_sampled_queries_give_no_percentage(monkeypatch):
    """Most of the sample are corners, which see the least: of all pairs two thirds never meet, of theirs it is unknown."""
    monkeypatch.setattr("ultrazoo.analysis.coverage.ALL_TOKENS", 100)
    compared = comparison.compare([fake_plan("sparse", attention=(Rows(),) * 4)])
    assert compared[0].coverage.how == "sampled"
    printed = comparison.text(compared)
    assert "never (some apart)" in printed
    assert "never meet: some pairs, how many is not known; for example" in printed
    assert "% apart" not in printed
    never = comparison.rows(compared)[0]["coverage"]["never_meet"]
    assert never["share"] is None
    assert never["pairs"] > 0
    assert "never (some apart)" in plot.plot(compared, "svg").decode()
