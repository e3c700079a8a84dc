"""Flicker, consistency and feature consistency: against fp64, and on videos whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.evaluate import clips
from tests.oracles import measures
from ultrazoo.evaluate.motion import Consistency, FeatureConsistency, Flicker
from ultrazoo.evaluate.run import evaluate


def fed(measure, video):
    for frame in video:
        measure.update(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1))
    return measure.result()


def test_flicker_is_that_of_fp64(tmp_path):
    video = clips.smooth(6, 37, 51)
    file = clips.write(tmp_path / "v.mkv", video)
    (one,) = evaluate([file], metrics=["flicker"]).videos
    value, change = measures.flicker(video.astype(np.float64))
    got = one["measures"]["flicker"]
    assert got["value"] == pytest.approx(value, rel=1e-6)
    assert got["change"] == pytest.approx(change, rel=1e-12)
    assert measures.flicker(video[::-1].astype(np.float64)[::2])[0] != pytest.approx(value, rel=1e-2)


def test_flicker_is_the_amplitude_of_what_alternates():
    base = np.full((8, 16, 16, 3), 100)
    signs = np.where(np.arange(8) % 2, -1, 1)[:, None, None, None]
    assert fed(Flicker(), (base + 7 * signs).astype(np.uint8))["value"] == pytest.approx(7, rel=1e-5)
    assert fed(Flicker(), base.astype(np.uint8))["value"] == 0
    fade = (base + 5 * np.arange(8)[:, None, None, None]).astype(np.uint8)
    faded = fed(Flicker(), fade)
    assert faded["value"] == pytest.approx(0, abs=1e-4)
    assert faded["change"] == 5


def test_flicker_cannot_tell_fine_motion_from_flicker():
    """What the documentation says that it cannot see."""
    moving = fed(Flicker(), clips.panning(5, 32, 32, (1, 0)))["value"]
    assert moving > 20


def test_consistency_is_that_of_fp64(tmp_path):
    moved = clips.panning(4, 61, 83, (2, -3)).astype(int) + np.random.default_rng(1).integers(-20, 21, (4, 61, 83, 3))
    video = np.clip(moved, 0, 255).astype(np.uint8)
    file = clips.write(tmp_path / "v.mkv", video)
    (one,) = evaluate([file], metrics=["consistency"]).videos
    best, unmoved = measures.consistency(video.astype(np.float64))
    got = one["measures"]["consistency"]
    assert got["value"] == pytest.approx(best, rel=1e-5)
    assert got["unmoved"] == pytest.approx(unmoved, rel=1e-5)
    assert 5 < best < unmoved / 3


def test_consistency_of_a_wide_video_is_that_of_the_reduced_one():
    video = clips.smooth(2, 101, 1030, grain=7)
    best, unmoved = measures.consistency(video.astype(np.float64))
    got = fed(Consistency(), video)
    assert (got["reduced"], got["reach_px"]) == (3, 24)
    assert got["value"] == pytest.approx(best, rel=1e-5)
    assert got["unmoved"] == pytest.approx(unmoved, rel=1e-5)


@pytest.mark.parametrize("step", [(0, 0), (3, -5), (8, 8), (-8, 2)])
def test_motion_within_reach_is_explained(step):
    got = fed(Consistency(), clips.panning(3, 72, 80, step))
    assert got["value"] == 0
    assert (got["unmoved"] > 50) == (step != (0, 0))


@pytest.mark.parametrize("step", [(9, 0), (0, -12)])
def test_motion_beyond_reach_counts_as_an_error(step):
    got = fed(Consistency(), clips.panning(3, 72, 80, step))
    assert got["value"] > 0.8 * got["unmoved"] > 50


def test_noise_is_inconsistent_and_a_frozen_video_is_perfect():
    noise = fed(Consistency(), clips.noise(3, 64, 64))
    assert noise["value"] > 50
    frozen = np.repeat(clips.noise(1, 64, 64), 3, 0)
    assert fed(Consistency(), frozen) == {"value": 0, "unmoved": 0, "reduced": 1, "reach_px": 8}


def test_feature_consistency_is_that_of_fp64(tmp_path):
    video = clips.smooth(4, 40, 44)
    clips.script(clips.Frame(), tmp_path / "frames.pt")
    file = clips.write(tmp_path / "v.mkv", video)
    (one,) = evaluate([file], metrics=["feature_consistency"], networks=tmp_path).videos
    z = video.astype(np.float64) / 127.5 - 1
    vectors = z.reshape(4, 4, 10, 4, 11, 3).mean((2, 4)).reshape(4, -1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    got = one["measures"]["feature_consistency"]
    assert got["value"] == pytest.approx(np.mean([unit[t] @ unit[t - 1] for t in range(1, 4)]), rel=1e-5)
    assert got["with_first"] == pytest.approx(np.mean([unit[t] @ unit[0] for t in range(1, 4)]), rel=1e-5)
    assert got["value"] != pytest.approx(got["with_first"], rel=1e-3)


def test_feature_consistency_of_a_frozen_video():
    frozen = np.repeat(clips.noise(1, 32, 32), 3, 0)
    got = fed(FeatureConsistency(clips.Frame()), frozen)
    assert got["value"] == pytest.approx(1)
    assert got["with_first"] == pytest.approx(1)
