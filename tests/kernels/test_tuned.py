"""Measured orders of kernels: kept in the user's cache, followed by the door, recorded in plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.program import here
from ultrazoo import tuned
from ultrazoo.kernels import attend, record
from ultrazoo.kernels.door import Inputs, measured_key


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ULTRAZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_door_follows_a_measured_order(cache: Path) -> None:
    q = torch.randn(1, 2, 9, 8)
    with record() as runs:
        attend(q, q, q)
        tuned.save("2026-01-01", {measured_key(Inputs(q, q, q)): ["math", "sdpa"]})
        attend(q, q, q)
        # another dtype was not measured
        attend(q.double(), q.double(), q.double())
        assert tuned.forget()
        attend(q, q, q)
    assert [run.kernel for run in runs] == ["sdpa", "math", "sdpa", "sdpa"]
    assert not list(cache.iterdir())


def test_a_measured_kernel_that_cannot_run_is_passed_over(cache: Path) -> None:
    q = torch.randn(1, 2, 9, 8)
    tuned.save("2026-01-01", {measured_key(Inputs(q, q, q)): ["flash_attn", "gathered", "math"]})
    with record() as runs:
        attend(q, q, q)
    assert [run.kernel for run in runs] == ["math"]
    assert cache.is_dir()


def test_a_damaged_file_counts_for_nothing(cache: Path) -> None:
    cache.mkdir()
    (cache / tuned.NAME).write_text("{ not json")
    assert tuned.summary() == {"order": "fixed"}


def test_tune_measures_every_kernel_that_can_run(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("ultrazoo.kernels.tune.SIZES", {"cpu": (256, 2), "cuda": (1024, 2)})
    monkeypatch.setattr("ultrazoo.kernels.tune.REPEATS", 2)
    # compiling is not what is tested here
    monkeypatch.setattr("ultrazoo.kernels.flex._no_compiler", lambda: "needs a C++ compiler: none")
    ran = here(capsys, "list", "kernels", "--tune", "--json")
    assert ran.code == 0
    data = json.loads(ran.out)
    assert Path(data["file"]) == cache / tuned.NAME
    assert {row["kernel"] for row in data["measured"]} >= {"sdpa", "math", "gathered", "by_key"}
    # an order of maps of single queries is one of its own
    kinds = {row["key"].rpartition("| ")[2] for row in data["measured"] if row["kernel"] == "by_key"}
    assert kinds == {"blocks of single queries"}
    assert all(row["seconds"] > 0 and row["error"] < 0.02 for row in data["measured"])
    orders = json.loads((cache / tuned.NAME).read_text())["orders"]
    assert {row["key"] for row in data["measured"]} == set(orders)
    assert "measured on" in here(capsys, "list", "kernels").out
    assert here(capsys, "list", "kernels", "--forget").code == 0
    assert "measured on" not in here(capsys, "list", "kernels").out


def test_flags_of_kernels_belong_to_kernels(cache: Path, capsys) -> None:
    for line in (["list", "plugins", "--tune"], ["list", "kernels", "--tune", "--forget"]):
        ran = here(capsys, *line)
        assert ran.code == 2
        assert "--tune" in ran.err
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where a folder is due")
    with pytest.raises(OSError):
        tuned.save("2026-01-01", {})
    assert cache.read_text() == "a file where a folder is due"
