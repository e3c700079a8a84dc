"""Conversion of a full-size checkpoint: anonymous memory and time, and every bit back."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import ultrazoo
from benchmarks.measure import Watched, watch
from benchmarks.rows import ROOT, Row
from ultrazoo import assemble
from ultrazoo.weights import digest
from ultrazoo.weights.match import detect
from ultrazoo.weights.reader import open_checkpoint
from ultrazoo.weights.slots import slots_of
from ultrazoo.weights.tensors import Entry
from ultrazoo.weights.writer import order, write_checkpoint

GIGABYTE = 10**9
LIMIT = 1.5 * GIGABYTE
RECIPE = {
    "schema": 1,
    "name": "wan",
    "video": {"grid": [21, 30, 52]},
    "backbone": {"name": "wan", "preset": "t2v_1_3b"},
    "attention": {"*": {"name": "full"}},
}


def full_size(directory: Path) -> int:
    """A bf16 checkpoint of Wan2.1-T2V-1.3B's names and shapes, no tensor like another; returns its bytes."""
    model = assemble.skeleton(ultrazoo.plan(RECIPE))
    entries = order([Entry(slot.name, slot.shape, torch.bfloat16) for slot in slots_of(model) if slot.saved])
    generator = torch.Generator().manual_seed(0)
    rows = ((entry.name, torch.randn(entry.shape, generator=generator).bfloat16()) for entry in entries)
    directory.mkdir()
    write_checkpoint(directory, entries, rows, stem="diffusion_pytorch_model")
    return sum(entry.nbytes for entry in entries)


def tensors_digest(path: Path) -> str:
    """SHA-256 of all tensors by our names, whatever the layout."""
    with open_checkpoint(path) as checkpoint:
        return digest.of_tensors(checkpoint, *detect(checkpoint))


def test_conversion_of_the_1_3b_model(environment: dict[str, str], record: Callable[[Row], None], command: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        size = full_size(place / "wan")

        def run(*words: str) -> Watched:
            line = [sys.executable, "-m", "ultrazoo", "convert", *words]
            done = watch(line, cwd=place, env=environment | {"PYTHONPATH": str(ROOT)})
            assert done.code == 0, done.output
            return done

        steps = {
            "diffusers": run("wan", "hub", "--to", "diffusers"),
            "ultrazoo": run("hub", "ours", "--to", "ultrazoo"),
            "ckpt": run("ours", "back.ckpt", "--to", "wan"),
            "wan": run("back.ckpt", "again", "--to", "wan"),
        }
        due = tensors_digest(place / "wan")
        # the last one came through all of them
        assert tensors_digest(place / "again") == due
    numbers = {f"to_{to}_peak_anon_gb": round(done.peak_anon / GIGABYTE, 2) for to, done in steps.items()}
    numbers |= {f"to_{to}_s": round(done.wall_s, 1) for to, done in steps.items()}
    met = max(done.peak_anon for done in steps.values()) <= LIMIT
    case = f"convert a synthetic 1.3B checkpoint ({size / GIGABYTE:.2f} GB): wan, diffusers, ultrazoo, one .ckpt, wan"
    gate = f"SHA-256 of all tensors the same after the four conversions ({due[:12]})"
    record(Row(case, "full", "bfloat16", gate, numbers, command, "at most 1.5 GB of anonymous memory", met))
    assert met, numbers
