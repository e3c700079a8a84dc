"""Files that cannot be measured: one message that says which, what was found and what to do; exit code 2, nothing on stdout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.program import environment, here
from tests.evaluate import clips
from ultrazoo.errors import UsageError
from ultrazoo.evaluate.run import evaluate
from ultrazoo.evaluate.video import frames

H264 = {"codec": "libx264", "form": "yuv420p"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in, with the video ``v.mkv`` of 4 frames, 64x48."""
    monkeypatch.chdir(tmp_path)
    clips.write(tmp_path / "v.mkv", clips.smooth(4, 48, 64))
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    ran = here(capsys, "evaluate", *arguments)
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    assert ran.err.count("\n") == 1, ran.err
    return ran.err


def test_a_file_that_is_no_video(capsys, place):
    (place / "text.mp4").write_text("not a video\n" * 50)
    (place / "empty.mp4").touch()
    (place / "holder").mkdir()
    assert "absent.mp4: no such file" in refused(capsys, "absent.mp4")
    assert "holder: a directory" in refused(capsys, "holder")
    assert "text.mp4 cannot be read as a video" in refused(capsys, "text.mp4")
    assert "empty.mp4 cannot be read as a video" in refused(capsys, "empty.mp4")
    assert "no such file" in refused(capsys, "https://example.org/v.mp4")


def test_a_playlist_opens_nothing_else(capsys, place):
    (place / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    (place / "list.txt").write_text("ffconcat version 1.0\nfile v.mkv\n")
    assert "list.m3u8 cannot be read as a video" in refused(capsys, "list.m3u8")
    assert "list.txt cannot be read as a video" in refused(capsys, "list.txt")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", H264),
        ("front.mp4", {**H264, "movflags": "faststart"}),
        ("lossless.mkv", {}),
        ("v.avi", {"codec": "mpeg4", "form": "yuv420p"}),
    ],
)
def test_a_file_that_was_cut_short(capsys, place, name, options, share):
    whole = clips.write(place / name, clips.noise(12, 48, 64), **options)
    assert len(list(frames(whole))) == 12
    content = whole.read_bytes()
    whole.write_bytes(content[: int(share * len(content))])
    assert name in refused(capsys, name, "--metrics", "flicker")


def test_a_file_with_a_damaged_middle(capsys, place):
    file = clips.write(place / "bad.mp4", clips.noise(12, 48, 64), **H264)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(clips.noise(1, 1, 400).reshape(-1)[:400])
    file.write_bytes(content)
    assert "bad.mp4 is damaged" in refused(capsys, "bad.mp4", "--metrics", "flicker")


def test_a_file_with_sound_alone(capsys, place):
    clips.sound(place / "song.wav")
    clips.sound(place / "song.mkv")
    assert "song.wav has no video in it, only audio" in refused(capsys, "song.wav")
    assert "song.mkv has no video in it, only audio" in refused(capsys, "v.mkv", "--reference", "song.mkv")


@pytest.mark.parametrize("name", ["one.mkv", "one.mp4"])
def test_one_frame(capsys, place, name):
    clips.write(place / name, clips.smooth(1, 48, 64), **({} if name.endswith("mkv") else H264))
    told = refused(capsys, name)
    assert "needs 3" in told or "needs three frames" in told
    assert "consistency" in refused(capsys, name, "--metrics", "consistency")
    ran = here(capsys, "evaluate", name, "--metrics", "hd_mse")
    assert ran.code == 0


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_sizes_and_counts_that_differ(capsys, place, suffix):
    options = {} if suffix == "mkv" else H264
    names = [f"{n}.{suffix}" for n in ("a", "small", "short")]
    for name, shape in zip(names, [(4, 48, 64), (4, 48, 62), (3, 48, 64)], strict=True):
        clips.write(place / name, clips.smooth(*shape), **options)
    a, small, short = names
    assert f"{a} is 64x48, its reference {small} is 62x48" in refused(capsys, a, "--reference", small)
    assert f"{a} has 4 frames, its reference {short} has 3" in refused(capsys, a, "--reference", short)
    assert f"{short} has 3 frames, its reference {a} has 4" in refused(capsys, short, "--reference", a)


def test_a_video_too_small_for_a_measure(capsys, place):
    clips.write(place / "tiny.mkv", clips.smooth(4, 10, 40))
    assert "consistency needs 32, hd_mse needs 32" in refused(capsys, "tiny.mkv")
    assert "ssim needs 11" in refused(capsys, "tiny.mkv", "--reference", "tiny.mkv", "--metrics", "ssim")


def test_a_bad_file_is_told_before_any_work(place, monkeypatch):
    read = []
    monkeypatch.setattr("ultrazoo.evaluate.run.frames", lambda path, _: read.append(path) or iter(()))
    with pytest.raises(UsageError, match=r"absent\.mkv"):
        evaluate(["v.mkv", "absent.mkv"])
    assert read == []


def test_reading_holds_few_frames(place):
    """120 frames of 480x640 are 111 MB as bytes; a run over them takes hardly more memory than one over 12."""
    clips.write(place / "short.mp4", clips.smooth(12, 480, 640), codec="mpeg4", form="yuv420p")
    once = clips.smooth(12, 480, 640)
    clips.write(place / "long.mp4", [frame for _ in range(10) for frame in once], codec="mpeg4", form="yuv420p")
    code = (
        "import resource\n"
        "from ultrazoo.evaluate.run import evaluate\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "for name in ('short.mp4', 'long.mp4'):\n"
        "    found = evaluate([name], [name], metrics=['psnr', 'flicker'])\n"
        "    print(found.videos[0]['frames'], peak())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (few, before), (many, after) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (12, 120)
    assert after - before < 40, f"{before:.0f} MB for 12 frames, {after:.0f} MB for 120"
