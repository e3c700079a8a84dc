"""A directory appears whole or not at all: refusals, replacement, dead and living neighbours, full and read-only disks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ultrazoo.errors import OutputError
from ultrazoo.weights import staging
from ultrazoo.weights.disk import write_bytes
from ultrazoo.weights.staging import clean_stale, staged
from ultrazoo.weights.tensors import Entry
from ultrazoo.weights.writer import write_checkpoint

ROOT = Path(__file__).parents[2]


def fill(new, text="new"):
    write_bytes(new / "config.json", json.dumps({"ultrazoo": "0.1.0", "text": text}).encode())


def text_of(directory):
    return json.loads((directory / "config.json").read_text())["text"]


def fail(out, error):
    """A build that stops half-way."""
    with staged(out, force=True) as new:
        fill(new)
        raise error


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_it_appears_complete(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staged(out) as new:
        fill(new)
        assert not out.exists()
    assert text_of(out) == "new"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fail(tmp_path / "a" / "b" / "out", error)
    assert names(tmp_path) == []


def test_an_existing_directory_is_refused(tmp_path):
    with staged(tmp_path / "out") as new:
        fill(new, "old")
    with pytest.raises(OutputError, match=r"out exists; use --force"), staged(tmp_path / "out") as new:
        fill(new)
    assert text_of(tmp_path / "out") == "old"


def test_force_replaces_what_is_ours(tmp_path):
    with staged(tmp_path / "out") as new:
        fill(new, "old")
        write_bytes(new / "more", b"")
    with staged(tmp_path / "out", force=True) as new:
        fill(new)
        assert text_of(tmp_path / "out") == "old"
    assert names(tmp_path / "out") == ["config.json"]
    assert names(tmp_path) == ["out"]


def test_force_that_fails_keeps_the_old(tmp_path):
    with staged(tmp_path / "out") as new:
        fill(new, "old")
    with pytest.raises(RuntimeError):
        fail(tmp_path / "out", RuntimeError)
    assert text_of(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_force_spares_what_is_not_ours(tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="was not written by ultrazoo"), staged(out, force=True):
        pass
    assert names(out) == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    with staged(out, force=True) as new:
        fill(new)
    assert text_of(out) == "new"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is not a directory"), staged(tmp_path / "out", force=True):
        pass
    with (
        pytest.raises(OutputError, match=r"below .*out: it is a file, not a directory"),
        staged(tmp_path / "out" / "below"),
    ):
        pass
    assert (tmp_path / "out").read_text() == "x"


def test_a_link_to_a_directory_is_followed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    with staged(tmp_path / "out", force=True) as new:
        fill(new)
    assert text_of(tmp_path / "big") == "new"
    assert (tmp_path / "out").is_symlink()


def test_made_by_another_meanwhile(tmp_path):
    stack = contextlib.ExitStack()
    fill(stack.enter_context(staged(tmp_path / "out")))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="made by another process meanwhile"):
        stack.close()
    assert names(tmp_path) == ["out"]


KILLED = """
import json, sys, time
from pathlib import Path
from ultrazoo.weights import staging
out, when = sys.argv[1:]
if when == "between":
    rename = Path.rename
    def slow(self, target):
        if self.name == "new":
            print("here", flush=True)
            time.sleep(60)
        return rename(self, target)
    Path.rename = slow
with staging.staged(out, force=True) as new:
    (new / "config.json").write_text(json.dumps({"ultrazoo": "0", "text": "killed"}))
    if when == "filling":
        print("here", flush=True)
        time.sleep(60)
"""


@contextlib.contextmanager
def running(out, when):
    """Another process in the middle of a build of `out`."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), when], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout.readline() == b"here\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path):
    with running(tmp_path / "out", "filling"):
        assert len(names(tmp_path)) == 1
        # while it lives it is left alone, and does not stop another build
        with staged(tmp_path / "out") as new:
            fill(new)
        assert len(names(tmp_path)) == 2
    assert len(names(tmp_path)) == 2
    with staged(tmp_path / "out", force=True) as new:
        assert len(names(tmp_path)) == 2
        fill(new, "next")
    assert names(tmp_path) == ["out"]
    assert text_of(tmp_path / "out") == "next"


def test_a_build_killed_between_the_renames_loses_nothing(tmp_path):
    with staged(tmp_path / "out") as new:
        fill(new, "old")
    with running(tmp_path / "out", "between"):
        assert not (tmp_path / "out").exists()
    clean_stale(tmp_path / "out")
    assert text_of(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_interrupt_leaves_nothing(tmp_path):
    with running(tmp_path / "out", "filling") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    assert names(tmp_path) == []


def test_neighbours_of_other_names_are_left_alone(tmp_path):
    for name in (".out2.ultrazoo-abc", ".out.ultrazoo", "out.ultrazoo-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").write_text("")
    assert clean_stale(tmp_path / "out") == []
    assert len(names(tmp_path)) == 3


def test_names_with_wildcards(tmp_path):
    work = tmp_path / ".a[0]*.ultrazoo-abc"
    work.mkdir()
    (work / "lock").write_text("")
    assert clean_stale(tmp_path / "a[0]*") == [work]


def test_a_work_directory_without_a_lock_is_given_time(tmp_path):
    work = tmp_path / ".out.ultrazoo-abc"
    work.mkdir()
    assert clean_stale(tmp_path / "out") == []
    os.utime(work, (time.time() - 100, time.time() - 100))
    assert clean_stale(tmp_path / "out") == [work]


@contextlib.contextmanager
def mounted(place, options):
    """A small file system in memory, where we may mount one."""
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    # more than fits, and the check of free space that would say so is switched off
    monkeypatch.setattr("ultrazoo.weights.writer.check_space", lambda *_: None)
    entry = Entry("a", (1 << 19,), torch.float32)
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        with pytest.raises(OutputError, match="the disk is full"), staged(disk / "deep" / "out") as new:
            write_checkpoint(new, [entry], iter([("a", torch.zeros(entry.shape))]))
        assert names(disk) == []


def test_free_space_is_checked_first(tmp_path):
    entry = Entry("a", (1 << 19,), torch.float32)
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        with pytest.raises(OutputError, match=r"has .* free, 2.1 MB are needed"), staged(disk / "out") as new:
            write_checkpoint(new, [entry], iter([]))
        assert names(disk) == []


def test_a_read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    with (
        mounted(disk, "size=1m,ro"),
        pytest.raises(OutputError, match="the file system is read-only"),
        staged(disk / "out"),
    ):
        pass
    assert names(disk) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="permission denied"), staged(tmp_path / "closed" / "out"):
        pass
    assert names(tmp_path / "closed") == []


def test_the_tree_is_flushed_before_it_appears(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(staging, "_sync", lambda directory: seen.append((directory.name, (tmp_path / "out").exists())))
    with staged(tmp_path / "out") as new:
        fill(new)
    assert seen == [("new", False), (tmp_path.name, True)]
