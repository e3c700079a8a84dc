"""`ultrazoo evaluate`: its table, its JSON, what it leaves out and why, its usage errors, packages that are absent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.cli.program import ROOT, environment, here
from tests.evaluate import clips
from tests.evaluate.test_files import refused
from ultrazoo.evaluate import table


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in: two videos of 8 frames, 64x48, and every feature network in ``nets``."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        clips.write(tmp_path / f"{name}.mkv", clips.smooth(8, 48, 64, seed=seed))
    nets = tmp_path / "nets"
    nets.mkdir()
    save_file(clips.alexnet(), nets / "lpips.safetensors")
    clips.script(clips.Clips(), nets / "fvd.pt")
    clips.script(clips.Frame(), nets / "frames.pt")
    return tmp_path


EVERYTHING = ("--reference", "b.mkv", "--networks", "nets", "--patch", "32", "--clip", "4")


def test_every_measure_as_json(capsys, place):
    ran = here(capsys, "evaluate", "a.mkv", *EVERYTHING, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    (video,) = found["videos"]
    facts = {key: video[key] for key in ("video", "reference", "width", "height", "frames", "fps")}
    assert facts == {"video": "a.mkv", "reference": "b.mkv", "width": 64, "height": 48, "frames": 8, "fps": 8}
    assert {*video["measures"], *found["sets"]} == set(table.NAMES)
    assert found["left_out"] == {}
    assert set(found["networks"]) == {"lpips", "fvd", "frames"}
    alone = json.loads(here(capsys, "evaluate", "b.mkv", "--networks", "nets", "--json").out)["videos"][0]["measures"]
    for name in ("flicker", "consistency", "feature_consistency", "hd_mse", "hd_lpips"):
        assert video["measures"][name]["reference"] == alone[name]["value"] != video["measures"][name]["value"]


def test_the_table_says_the_same(capsys, place):
    ran = here(capsys, "evaluate", "a.mkv", *EVERYTHING)
    found = json.loads(here(capsys, "evaluate", "a.mkv", *EVERYTHING, "--json").out)
    assert ran.out.startswith("a.mkv: 64x48, 8 frames, against b.mkv\n")
    for name, one in [*found["videos"][0]["measures"].items(), *found["sets"].items()]:
        row = next(line for line in ran.out.splitlines() if re.match(rf" +{name} ", line))
        assert row.split()[1] == f"{one['value']:.6g}"
        assert table.row(name).better in row.split()


def test_what_is_left_out_has_a_reason(capsys, place):
    ran = here(capsys, "evaluate", "a.mkv")
    assert ran.code == 0
    for name in ("psnr", "ssim", "hd_fvd"):
        assert re.search(rf"^{name} +needs a video to compare with \(--reference\)", ran.out, re.MULTILINE), name
    assert re.search(r"^hd_lpips +needs the feature network 'lpips' in the directory of --networks", ran.out, re.M)
    assert re.search(r"^  hd_mse +[\d.]+ ", ran.out, re.M)
    some = here(capsys, "evaluate", "a.mkv", "--metrics", "hd_mse,flicker")
    assert "left out" not in some.out
    assert "consistency" not in some.out


def test_identical_videos_are_json(capsys, place):
    ran = here(capsys, "evaluate", "a.mkv", "--reference", "a.mkv", "--metrics", "psnr", "--json")
    (video,) = json.loads(ran.out)["videos"]
    assert video["measures"] == {"psnr": {"value": None, "note": "identical: there is no error"}}
    ran = here(capsys, "evaluate", "a.mkv", "--reference", "a.mkv", "--metrics", "psnr")
    assert re.search(r"psnr +- +dB +higher +identical", ran.out)


def test_several_videos_are_measured_each_with_its_own(capsys, place):
    line = ("a.mkv", "b.mkv", "--reference", "b.mkv", "--reference", "b.mkv", "--metrics", "psnr", "--json")
    first, second = json.loads(here(capsys, "evaluate", *line).out)["videos"]
    assert (first["video"], second["video"]) == ("a.mkv", "b.mkv")
    assert first["measures"]["psnr"]["value"] < 30
    assert second["measures"]["psnr"]["value"] is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["a.mkv", "--metrics", "hdmse"], "there is no measure 'hdmse'; did you mean 'hd_mse'?"),
        (["a.mkv", "--metrics", ","], "no measure is asked for"),
        (["a.mkv", "--metrics", "psnr"], "psnr needs a video to compare with (--reference)"),
        (["a.mkv", "--metrics", "hd_lpips"], "hd_lpips needs the feature network 'lpips'"),
        (["a.mkv", "b.mkv", "--reference", "a.mkv"], "2 videos, 1 reference"),
        (["a.mkv", "--networks", "absent"], "--networks absent: no such directory"),
        (["a.mkv", "--networks", "a.mkv"], "--networks a.mkv: not a directory"),
        (["a.mkv", *EVERYTHING[:4]], "smaller than the patches of hd_fvd, 224 pixels (--patch)"),
        (["a.mkv", *EVERYTHING[:6], "--clip", "9"], "two clips or more"),
        (["a.mkv", *EVERYTHING[:6], "--clip", "0"], "got 32 pixels and 0 frames"),
        (["a.mkv", "--device", "cudda"], "the device 'cudda' cannot be used"),
    ],
)
def test_wrong_usage_is_one_message(capsys, place, line, words):
    assert words in refused(capsys, *line)


@pytest.mark.parametrize(
    ("package", "line"),
    [("av", ["a.mkv"]), ("torchmetrics", ["a.mkv", "--reference", "b.mkv"])],
)
def test_an_absent_package_is_named_with_what_installs_it(capsys, place, monkeypatch, package, line):
    monkeypatch.setitem(sys.modules, package, None)
    told = refused(capsys, *line)
    assert f"{package} is not installed" in told
    assert "pip install 'ultrazoo[evaluate]'" in told


def test_what_needs_no_torchmetrics_runs_without(capsys, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert here(capsys, "evaluate", "a.mkv", "--reference", "b.mkv", "--metrics", "psnr,hd_mse").code == 0


def test_help_imports_neither_torch_nor_pyav():
    code = (
        "import sys, ultrazoo.cli as cli\n"
        "code = cli.main(['evaluate', '--help'])\n"
        "heavy = {'torch', 'av', 'torchmetrics', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hd_fvd" in done.stdout


def test_the_documentation_says_what_each_measure_cannot_see():
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    for one in table.ROWS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{one.name}` "))
        assert one.blind in row, one.name
        assert one.better in row
