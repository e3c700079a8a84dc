"""Sizes to grids: published token counts, and the nearest legal sizes in every refusal."""

from __future__ import annotations

import pytest

from ultrazoo.backbones.dit import DitSpec, Latent
from ultrazoo.backbones.geometry import Geometry
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import Video


@pytest.mark.parametrize(
    ("width", "height", "frames", "grid", "tokens"),
    [
        (832, 480, 81, (21, 30, 52), 32_760),
        (1280, 720, 81, (21, 45, 80), 75_600),
        (1920, 1088, 81, (21, 68, 120), 171_360),
        (3840, 2176, 81, (21, 136, 240), 685_440),
        (3840, 2160, 29, (8, 135, 240), 259_200),
        (1024, 1024, 1, (1, 64, 64), 4096),
    ],
)
def test_published_grids_of_wan(width, height, frames, grid, tokens):
    found, problems = WanSpec().grid(Video(width, height, frames))
    assert problems == []
    assert found == Grid(*grid)
    assert found.tokens == tokens


def test_ti2v_5b_compresses_space_by_32():
    spec = WanSpec(**WanSpec.presets["ti2v_5b"])
    assert spec.grid(Video(1280, 704, 121)) == (Grid(31, 22, 40), [])


def test_every_axis_that_does_not_fit_is_named_with_its_nearest_sizes():
    grid, problems = WanSpec().grid(Video(1930, 1080, 80))
    assert grid is None
    assert {p.path: p.fix for p in problems} == {
        "width": "nearest legal: 1920 or 1936",
        "height": "nearest legal: 1072 or 1088",
        "frames": "nearest legal: 77 or 81",
    }
    assert all(str(got) in p.rule for got, p in zip((1080, 1930, 80), problems, strict=True))


def test_sizes_below_one_token():
    _, problems = WanSpec().grid(Video(8, 0, 0))
    assert {p.path: p.fix for p in problems} == {
        "width": "nearest legal: 16",
        "height": "nearest legal: 16",
        "frames": "nearest legal: 1",
    }


def test_the_suggested_sizes_are_legal():
    spec = WanSpec()
    for frames in range(1, 40):
        _, problems = spec.grid(Video(320, 320, frames))
        if problems:
            for legal in problems[0].fix.removeprefix("nearest legal: ").split(" or "):
                assert spec.grid(Video(320, 320, int(legal)))[1] == []


def test_a_grid_is_taken_as_it_is_and_excludes_pixels():
    assert WanSpec().grid(Video(grid=Grid(5, 7, 9))) == (Grid(5, 7, 9), [])
    _, problems = WanSpec().grid(Video(width=832, frames=5, grid=Grid(5, 7, 9)))
    assert {p.path for p in problems} == {"width", "frames"}


def test_a_missing_size_is_a_problem():
    _, problems = WanSpec().grid(Video(width=832))
    assert [p.path for p in problems] == ["height"]


def test_a_vae_that_is_not_causal_rounds_frames_up():
    geometry = Geometry((4, 8, 8), (1, 2, 2), causal=False)
    assert geometry.grid(Video(64, 64, 17)) == (Grid(5, 4, 4), [])
    assert Geometry((1, 8, 8), (2, 2, 2), causal=False).grid(Video(64, 64, 5)) == (Grid(3, 4, 4), [])


@pytest.mark.parametrize("preset", ["xl_2", "l_4", "s_8"])
def test_dit_at_256_pixels_is_what_its_preset_was_trained_at(preset):
    spec = DitSpec(**DitSpec.presets[preset])
    assert spec.grid(Video(256, 256)) == (Grid(*spec.trained), [])


def test_dit_with_a_causal_video_vae():
    spec = DitSpec(latent=Latent(strides=(4, 8, 8), channels=16, causal=True))
    assert spec.grid(Video(256, 128, 9)) == (Grid(3, 8, 16), [])
    _, problems = spec.grid(Video(256, 128, 10))
    assert problems[0].fix == "nearest legal: 9 or 13"
