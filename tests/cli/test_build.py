"""`ultrazoo build` as a user meets it: what it writes, what it refuses, and that nothing is left when it cannot."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import ultrazoo
from tests.cli.program import environment, here

FILES = {"README.md", "config.json", "model.safetensors", "plan.json", "recipe.yaml", "report.html"}


def left(place: Path) -> set[str]:
    """Everything in the directory beside the recipe."""
    return {path.name for path in place.iterdir()} - {"tiny.yaml"}


def test_build_writes_the_whole_directory(capsys, place):
    ran = here(capsys, "build", "tiny.yaml", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    directory = place / "outputs" / "tiny"
    assert {path.name for path in directory.iterdir()} == FILES == {row["name"] for row in told["files"]}
    assert {path.name for path in directory.parent.iterdir()} == {"tiny"}
    plan = json.loads((directory / "plan.json").read_text())
    assert told["hash"] == plan["hash"] == ultrazoo.plan(directory / "recipe.yaml").hash
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 (not a mapping)
    assert count == plan["totals"]["parameters"] == told["parameters"]
    page = (directory / "report.html").read_text()
    assert "<svg" in page or "data:image/png;base64," in page
    assert 'src="http' not in page
    assert plan["hash"] in (directory / "README.md").read_text()


def test_progress_and_results_go_to_their_streams(capsys, place):
    ran = here(capsys, "build", "tiny.yaml", "-o", "there")
    assert ran.code == 0
    assert ran.err.startswith("building tiny")
    assert "\x1b" not in ran.err + ran.out
    assert "there/model.safetensors" in ran.out


def test_an_existing_directory_is_refused_unless_forced(capsys, place):
    assert here(capsys, "build", "tiny.yaml", "-o", "d").code == 0
    before = (place / "d" / "model.safetensors").read_bytes()
    ran = here(capsys, "build", "tiny.yaml", "-o", "d", "seed=1")
    assert ran.code == 2
    assert "exists; use --force" in ran.err
    assert (place / "d" / "model.safetensors").read_bytes() == before
    assert here(capsys, "build", "tiny.yaml", "-o", "d", "seed=1", "--force").code == 0
    assert (place / "d" / "model.safetensors").read_bytes() != before
    assert left(place) == {"d"}


def test_force_never_deletes_what_is_not_ours(capsys, place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("years")
    ran = here(capsys, "build", "tiny.yaml", "-o", "mine", "--force")
    assert ran.code == 2
    assert "not written by ultrazoo" in ran.err
    assert (place / "mine" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(
    "flags", [["--dry-run"], ["--device", "meta"], ["--dry-run", "--json"], ["--device", "meta", "--json"]]
)
def test_dry_runs_write_nothing(capsys, place, flags):
    ran = here(capsys, "build", "tiny.yaml", *flags)
    assert ran.code == 0
    assert left(place) == set()
    if "--json" in flags:
        told = json.loads(ran.out)
        parameters = told.get("parameters") or told["totals"]["parameters"]
        assert parameters == ultrazoo.plan("tiny.yaml").totals.parameters


def test_a_file_in_the_way(capsys, place):
    (place / "occupied").write_text("")
    ran = here(capsys, "build", "tiny.yaml", "-o", "occupied", "--force")
    assert ran.code == 2
    assert "not a directory" in ran.err
    ran = here(capsys, "build", "tiny.yaml", "-o", "occupied/below")
    assert ran.code == 2
    assert left(place) == {"occupied"}


@pytest.fixture
def closed(place: Path) -> Path:
    """A directory in which nothing can be made."""
    if os.geteuid() == 0:
        # permissions do not hold for root; the kernel's own file system does
        return Path("/sys/kernel")
    folder = place / "closed"
    folder.mkdir(mode=0o555)
    return folder


@pytest.mark.parametrize(
    "verb", [["build", "tiny.yaml"], ["show", "tiny.yaml"], ["schema"], ["new-plugin", "a/b"]], ids=str
)
def test_an_unwritable_directory(capsys, place, closed, verb):
    before = set(closed.iterdir())
    ran = here(capsys, *verb, "-o", str(closed / "out"))
    assert ran.code == 2
    assert str(closed) in ran.err
    assert "ermitted" in ran.err or "denied" in ran.err or "Read-only" in ran.err
    assert set(closed.iterdir()) == before


def test_a_disk_that_fills_up(place):
    """A file-size limit makes the write fail in the middle, as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfrom ultrazoo.cli import main; sys.exit(main(['build', 'tiny.yaml', '-o', 'out']))",
        ],
        cwd=place,
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2, ran.stderr
    assert "out" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert left(place) == set()


def test_too_little_room_is_said_before_anything_is_written(capsys, place, monkeypatch):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    ran = here(capsys, "build", "tiny.yaml")
    assert ran.code == 2
    assert "free" in ran.err
    assert left(place) == set()


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def bad_checkpoints(place: Path) -> dict[str, Path]:
    """Files that are no checkpoint of this model, by what is wrong with them."""
    import torch
    from safetensors.torch import save_file

    whole = place / "whole.safetensors"
    save_file({"a": torch.zeros(100)}, whole)
    cut = place / "truncated.safetensors"
    cut.write_bytes(whole.read_bytes()[:-50])
    bomb = place / "bomb.ckpt"
    bomb.write_bytes(pickle.dumps({"state_dict": Bomb(place / "exploded")}))
    zipped = place / "zipped.pt"
    torch.save({"x": Bomb(place / "exploded")}, zipped)
    noise = place / "noise.safetensors"
    noise.write_bytes(b"\xff" * 64)
    return {
        "another model": whole,
        "truncated": cut,
        "code": bomb,
        "zipped code": zipped,
        "noise": noise,
        "absent": place / "no",
    }


@pytest.mark.parametrize("wrong", ["another model", "truncated", "code", "zipped code", "noise", "absent"])
def test_a_bad_checkpoint_loads_nothing_and_writes_nothing(capsys, place, wrong):
    path = bad_checkpoints(place)[wrong]
    before = left(place)
    ran = here(capsys, "build", "tiny.yaml", f"weights={{path: {path}, format: auto}}")
    assert ran.code == 2, ran.err
    assert path.name in ran.err
    assert "Traceback" not in ran.err
    assert left(place) == before
    assert not (place / "exploded").exists()


def test_weights_of_an_earlier_build_are_reported(capsys, place):
    assert here(capsys, "build", "tiny.yaml", "-o", "first").code == 0
    ran = here(capsys, "build", "tiny.yaml", "-o", "second", "weights={path: first, format: auto}", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["weights"]
    same = [(place / name / "model.safetensors").read_bytes()[-1000:] for name in ("first", "second")]
    assert same[0] == same[1]
