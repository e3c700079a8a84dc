"""PSNR, SSIM and LPIPS through files, against fp64; videos that are identical, noise, frozen or shifted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.evaluate import clips
from tests.oracles import measures
from ultrazoo.evaluate import pixels
from ultrazoo.evaluate.run import evaluate


@pytest.fixture(scope="module")
def frames():
    """Two related videos, odd sizes: blobs, and the same with noise of ±20 levels."""
    first = clips.smooth(4, 45, 67)
    other = first.astype(int) + np.random.default_rng(3).integers(-20, 21, first.shape)
    return first, np.clip(other, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def files(frames, tmp_path_factory):
    place = tmp_path_factory.mktemp("videos")
    return [clips.write(place / f"{name}.mkv", video) for name, video in zip("ab", frames, strict=True)]


def measured(files, *names, **options):
    video, reference = files
    (one,) = evaluate([video], [reference], metrics=names, **options).videos
    return one["measures"]


def test_a_lossless_file_gives_its_frames_back(frames, files):
    from ultrazoo.evaluate.video import frames as read

    got = torch.stack(list(read(files[0]))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got, frames[0])
    assert not np.array_equal(got, frames[1])


def test_psnr_and_ssim_are_those_of_fp64(frames, files):
    a, b = (video.astype(np.float64) for video in frames)
    got = measured(files, "psnr", "ssim")
    assert got["psnr"]["value"] == pytest.approx(measures.psnr(a, b), rel=1e-12)
    assert got["ssim"]["value"] == pytest.approx(measures.ssim(a, b), rel=1e-5)
    worst = [measures.psnr(x[None], y[None]) for x, y in zip(a, b, strict=True)]
    assert got["psnr"]["worst"] == pytest.approx(min(worst), rel=1e-12)
    assert got["psnr"]["worst_frame"] == int(np.argmin(worst))
    # the comparison can fail: one frame less noisy than the others is seen
    assert measures.psnr(a, (a + b) / 2) != pytest.approx(got["psnr"]["value"], rel=1e-3)
    assert measures.ssim(a, (a + b) / 2) != pytest.approx(got["ssim"]["value"], rel=1e-3)


def test_one_broken_frame_is_not_hidden_by_perfect_ones(tmp_path):
    good = clips.smooth(5, 32, 32)
    broken = good.copy()
    broken[3] = 0
    files = [clips.write(tmp_path / f"{n}.mkv", v) for n, v in (("x", broken), ("y", good))]
    got = measured(files, "psnr", "ssim")
    assert got["psnr"]["worst_frame"] == got["ssim"]["worst_frame"] == 3
    assert got["psnr"]["value"] == pytest.approx(got["psnr"]["worst"] + 10 * np.log10(5), rel=1e-9)


@pytest.mark.parametrize("height", [11, 12, 16, 17, 21, 40])
def test_strips_of_rows_change_nothing(height, monkeypatch):
    a, b = (torch.from_numpy(clips.noise(1, height, 19, seed=s)[0]).permute(2, 0, 1) for s in (0, 1))
    b = (a.float() * 0.7 + b.float() * 0.3).round().to(torch.uint8)
    whole = pixels.Ssim()
    whole.update(a, b)
    monkeypatch.setattr(pixels, "STRIP", 4)
    strips = pixels.Ssim()
    strips.update(a, b)
    assert strips.result()["value"] == pytest.approx(whole.result()["value"], rel=1e-6)
    assert 0.1 < whole.result()["value"] < 0.95


@pytest.mark.parametrize(("make", "layout"), [(clips.alexnet, measures.ALEX), (clips.vgg, measures.VGG)])
def test_lpips_is_that_of_fp64(frames, files, tmp_path, make, layout):
    tensors = make()
    save_file(tensors, tmp_path / "lpips.safetensors")
    got = measured(files, "lpips", networks=tmp_path)["lpips"]
    exact = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    a, b = (video.astype(np.float64) for video in frames)
    each = [measures.lpips(x, y, exact, layout) for x, y in zip(a, b, strict=True)]
    assert got["value"] == pytest.approx(np.mean(each), rel=1e-5)
    assert got["worst"] == pytest.approx(max(each), rel=1e-5)
    assert got["value"] > 1e-3
    wrong = exact | {"lin0.model.1.weight": exact["lin0.model.1.weight"] * 2}
    assert measures.lpips(a[0], b[0], wrong, layout) != pytest.approx(each[0], rel=1e-2)


def test_identical_videos(files, tmp_path):
    save_file(clips.alexnet(), tmp_path / "lpips.safetensors")
    got = measured([files[0], files[0]], "psnr", "ssim", "lpips", networks=tmp_path)
    assert got["psnr"]["value"] is None
    assert "identical" in got["psnr"]["note"]
    assert got["ssim"]["value"] == pytest.approx(1, abs=1e-6)
    assert got["lpips"]["value"] == 0


def test_independent_noise_has_the_published_expectation(tmp_path):
    """Two independent uniform values of 0..255 differ by (256² - 1) / 6 in the mean square."""
    files = [clips.write(tmp_path / f"{s}.mkv", clips.noise(4, 64, 64, seed=s)) for s in (1, 2)]
    got = measured(files, "psnr", "ssim")
    assert got["psnr"]["value"] == pytest.approx(10 * np.log10(255**2 * 6 / (256**2 - 1)), abs=0.05)
    assert abs(got["ssim"]["value"]) < 0.03


def test_a_shift_of_one_pixel_costs_more_than_faint_noise(tmp_path):
    """What the documentation says that PSNR cannot see."""
    still = clips.panning(2, 64, 64, (0, 1))
    faint = still.astype(int) + np.random.default_rng(0).integers(-9, 10, still.shape)
    base = clips.write(tmp_path / "base.mkv", still[:1])
    shifted = clips.write(tmp_path / "shifted.mkv", still[1:])
    noisy = clips.write(tmp_path / "noisy.mkv", np.clip(faint[:1], 0, 255).astype(np.uint8))
    values = [measured([video, base], "psnr")["psnr"]["value"] for video in (shifted, noisy)]
    assert values[0] + 10 < values[1]
