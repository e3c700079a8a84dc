"""HD-MSE, HD-LPIPS and HD-FVD: against fp64, and on videos whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.evaluate import clips
from tests.oracles import measures
from ultrazoo.evaluate.detail import coarse
from ultrazoo.evaluate.frechet import Moments, frechet, starts
from ultrazoo.evaluate.run import evaluate
from ultrazoo.testing import assert_close


def one(file, name, **options):
    (found,) = evaluate([file], metrics=[name], **options).videos
    return found["measures"][name]


@pytest.mark.parametrize("size", [(64, 96), (33, 77), (50, 63)])
@pytest.mark.parametrize("factor", [8, 16, 32])
def test_smaller_and_larger_again_is_that_of_fp64(size, factor):
    frame = clips.noise(1, *size)[0].astype(np.float64)
    got = coarse(torch.from_numpy(frame).permute(2, 0, 1)[None], factor)[0].permute(1, 2, 0)
    assert_close("coarse", got, torch.from_numpy(measures.coarse(frame, factor)), 1e-10)


def test_hd_mse_is_that_of_fp64(tmp_path):
    video = clips.smooth(3, 70, 101)
    got = one(clips.write(tmp_path / "v.mkv", video), "hd_mse")
    assert got["value"] == pytest.approx(measures.hd_mse(video.astype(np.float64)), rel=1e-6)
    assert got["value"] == pytest.approx(np.mean(list(got["factors"].values())), rel=1e-12)
    assert measures.hd_mse(video[:2].astype(np.float64)) != pytest.approx(got["value"], rel=1e-4)


def test_hd_lpips_is_that_of_fp64(tmp_path):
    video = clips.smooth(2, 48, 57)
    tensors = clips.alexnet()
    save_file(tensors, tmp_path / "lpips.safetensors")
    got = one(clips.write(tmp_path / "v.mkv", video), "hd_lpips", networks=tmp_path)
    exact = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    wanted = measures.detail(video.astype(np.float64), lambda a, b: measures.lpips(a, b, exact, measures.ALEX))
    assert got["value"] == pytest.approx(wanted, rel=1e-5)
    assert wanted > 1e-3


def test_hd_mse_rewards_noise_and_gives_nothing_for_flat_colour(tmp_path):
    """What the documentation says that it cannot see."""
    scene = clips.smooth(2, 64, 64, grain=21)
    noisy = np.clip(scene.astype(int) + np.random.default_rng(0).integers(-60, 61, scene.shape), 0, 255)
    files = {
        "flat": np.full_like(scene, 90),
        "scene": scene,
        "noisy": noisy.astype(np.uint8),
        "noise": clips.noise(2, 64, 64),
    }
    values = {name: one(clips.write(tmp_path / f"{name}.mkv", v), "hd_mse")["value"] for name, v in files.items()}
    assert values["flat"] == pytest.approx(0, abs=1e-8)
    assert values["flat"] < values["scene"] < values["noisy"] < values["noise"]


@pytest.mark.parametrize(("length", "patch"), [(224, 224), (225, 224), (1088, 224), (2176, 224), (97, 32)])
def test_patches_are_the_fewest_that_cover_every_pixel(length, patch):
    found = starts(length, patch)
    covered = {p for start in found for p in range(start, start + patch)}
    assert covered == set(range(length))
    assert len(found) == -(-length // patch)


def features(video, patch, clip):
    """Features of clips.Clips in fp64, patch by patch."""
    vectors = []
    for begin in range(0, len(video) - clip + 1, clip):
        for top in starts(video.shape[1], patch):
            for left in starts(video.shape[2], patch):
                cut = video[begin : begin + clip, top : top + patch, left : left + patch] / 127.5 - 1
                x = np.moveaxis(cut.astype(np.float64), -1, 0)
                products = [
                    (x[:, 1:] * x[:, :-1]).mean(),
                    (x[:, :, 1:] * x[:, :, :-1]).mean(),
                    (x[..., 1:] * x[..., :-1]).mean(),
                ]
                vectors.append([*x.mean((1, 2, 3)), *products])
    return np.array(vectors)


def test_hd_fvd_is_that_of_fp64(tmp_path):
    """Two videos on each side, patches that overlap, frames left over."""
    clips.script(clips.Clips(), tmp_path / "fvd.pt")
    sides = [[clips.smooth(9, 45, 70, seed=s, grain=g) for s in (0, 1)] for g in (7, 9)]
    files = [
        [clips.write(tmp_path / f"{i}{k}.mkv", video) for k, video in enumerate(side)] for i, side in enumerate(sides)
    ]
    got = evaluate(*files, metrics=["hd_fvd"], networks=tmp_path, patch_px=32, clip_frames=4).sets["hd_fvd"]
    a, b = (np.concatenate([features(video, 32, 4) for video in side]) for side in sides)
    assert got["clips"] == [len(a), len(b)] == [24, 24]
    assert got["unused_frames"] == [2, 2]
    assert got["value"] == pytest.approx(measures.frechet(a, b), rel=1e-4)
    assert "note" not in got
    assert measures.frechet(a, a[::2]) != pytest.approx(got["value"], rel=1e-2)
    same = evaluate(files[0], files[0], metrics=["hd_fvd"], networks=tmp_path, patch_px=32, clip_frames=4)
    assert same.sets["hd_fvd"]["value"] == pytest.approx(0, abs=1e-6 * got["value"] + 1e-9)


def test_the_arguments_of_the_published_i3d_are_given(tmp_path):
    clips.script(clips.I3DLike(), tmp_path / "fvd.pt")
    files = [clips.write(tmp_path / f"{s}.mkv", clips.smooth(4, 64, 64, seed=s)) for s in (0, 1)]
    found = evaluate(files[:1], files[1:], metrics=["hd_fvd"], networks=tmp_path, patch_px=32, clip_frames=4)
    got = found.sets["hd_fvd"]
    assert np.isfinite(got["value"])
    assert got["features"] == 3
    assert set(found.networks) == {"fvd"}
    assert len(found.networks["fvd"]["sha256"]) == 64


def test_few_clips_are_said_to_be_few(tmp_path):
    clips.script(clips.Clips(), tmp_path / "fvd.pt")
    files = [clips.write(tmp_path / f"{s}.mkv", clips.smooth(4, 64, 64, seed=s)) for s in (0, 1)]
    got = evaluate(files[:1], files[1:], metrics=["hd_fvd"], networks=tmp_path, patch_px=32, clip_frames=4)
    assert "4 clips are few for 6 features" in got.sets["hd_fvd"]["note"]


def test_the_distance_of_two_normal_distributions():
    """Known in closed form where covariances commute: |m1 - m2|² + Σ (σ1 - σ2)²; means far from zero keep their digits."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 5))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    s, t = np.array([1, 2, 3, 0.5, 0]), np.array([2, 1, 1, 0.5, 0.1])
    sides = []
    for scale, mean in ((s, 1e4), (t, 1e4 + 2)):
        moments = Moments()
        for batch in np.array_split(z * scale + mean, 7):
            moments.update(torch.from_numpy(batch))
        sides.append(moments)
    assert frechet(*sides) == pytest.approx(5 * 4 + np.sum((s - t) ** 2), rel=1e-6)
    assert frechet(sides[0], sides[0]) == pytest.approx(0, abs=1e-6)
    exact = measures.frechet(z * s + 1e4, z * t + 1e4 + 2)
    assert frechet(*sides) == pytest.approx(exact, rel=1e-6)
