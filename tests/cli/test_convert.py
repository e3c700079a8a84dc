"""`ultrazoo convert` as it is typed: every layout there and back, and bad input, which ends with code 2 and writes nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.program import environment, here, start
from tests.cli.test_signals import half_way, interrupt
from tests.weights import layouts
from ultrazoo.weights import disk

HEADS = f"backbone.heads={layouts.HEADS}"
WAN = layouts.wan()
ULTRAGEN = layouts.ultragen((1,), rank=4)


def bits(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor of one file, or of all files in a directory: its type and its bytes."""
    held = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        held.update(load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True))
    return {key: (t.dtype, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for key, t in held.items()}


@pytest.mark.parametrize(
    ("shapes", "origin", "route"),
    [
        (WAN, "wan", ["diffusers", "ultrazoo", "wan"]),
        (WAN, "wan", ["ultrazoo", "diffusers", "wan"]),
        (ULTRAGEN, "ultragen", ["ultrazoo", "ultragen"]),
    ],
    ids=["wan by diffusers", "wan by ultrazoo", "ultragen"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_there_and_back(capsys, tmp_path, shapes, origin, route, suffix):
    tensors = layouts.tensors(shapes, torch.bfloat16)
    path = tmp_path / f"in{suffix}"
    torch.save(tensors, path) if suffix == ".ckpt" else save_file(tensors, path)
    source, before = path, origin
    for number, to in enumerate(route):
        target = tmp_path / (f"out{suffix}" if number == len(route) - 1 else to)
        heads = [HEADS] if number == 0 else []
        ran = here(capsys, "convert", source, target, "--to", to, *heads, "--json")
        assert ran.code == 0, ran.err
        told = json.loads(ran.out)
        assert (told["from"], told["to"], told["tensors"]) == (before, to, len(tensors))
        source, before = target, to
    assert bits(source) == bits(path)
    assert len(bits(path)) == len(tensors)


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def cut(path: Path) -> Path:
    """The first half of a file's bytes, in its place."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def bad(case: str, room: Path) -> tuple[Path, str, str]:
    """What to convert, to what, and words of the error."""
    tensors, path = layouts.tensors(WAN), room / "in.safetensors"
    to = "diffusers"
    if case == "another model":
        tensors, words = {"down_blocks.0.attentions.0.proj_in.weight": torch.ones(3)}, "is of no known format"
    elif case == "another size in one layer":
        tensors["blocks.1.self_attn.q.weight"] = torch.ones(32, 32)
        words = "wrong shape  blocks.1.self_attn.q.weight  file (32, 32)  model (24, 24)"
    elif case == "a layer that is not there":
        tensors = {key: tensor for key, tensor in tensors.items() if "blocks.0." not in key}
        words = "blocks.0."
    elif case == "unknown prefix":
        tensors, words = {f"net.{key}": t for key, t in tensors.items()}, "every key has the prefix 'net.'"
    elif case == "quantised":
        tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].to(torch.int8)
        words = "wrong type  blocks.0.ffn.0.weight  file int8  model float32"
    elif case == "extras":
        tensors, to, words = layouts.tensors(ULTRAGEN), "wan", "no place"
    elif case in ("half a file", "half a ckpt", "code"):
        path = room / ("in.safetensors" if case == "half a file" else "in.ckpt")
        words = "holds more than tensors" if case == "code" else "damaged, cut short"
        content = {**tensors, "step": Bomb(room / "trace")} if case == "code" else tensors
        save_file(tensors, path) if case == "half a file" else torch.save(content, path)
        return path if case == "code" else cut(path), to, words
    else:
        assert case == "no heads"
        words = "add backbone.heads=N"
    save_file(tensors, path)
    return path, to, words


CASES = ["another model", "another size in one layer", "a layer that is not there", "unknown prefix", "quantised"]
CASES += ["extras", "half a file", "half a ckpt", "code", "no heads"]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_2_and_writes_nothing(capsys, tmp_path, case):
    path, to, words = bad(case, tmp_path)
    for out in ["out", *([] if case == "no heads" else ["deep/out.ckpt"])]:
        heads = [] if case == "no heads" else [HEADS]
        ran = here(capsys, "convert", path, tmp_path / out, "--to", to, *heads)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert " ".join(words.split()) in " ".join(ran.err.split())
        assert "Traceback" not in ran.err
    assert {one.name for one in tmp_path.iterdir()} == {path.name}


@pytest.mark.parametrize("prefix", ["module.", "model.", "transformer.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapper_before_every_key_is_told(capsys, tmp_path, prefix):
    tensors = layouts.tensors(WAN)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "in.safetensors")
    ran = here(capsys, "convert", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "wan")
    assert ran.code == 0, ran.err
    assert f"wan, keys behind the prefix {prefix!r}" in ran.out
    assert set(bits(tmp_path / "out.safetensors")) == set(tensors)


def test_places_in_the_way(capsys, tmp_path):
    save_file(layouts.tensors(WAN), tmp_path / "in.safetensors")
    for out in ("d", "f.ckpt"):
        command = ("convert", tmp_path / "in.safetensors", tmp_path / out, "--to", "diffusers", HEADS)
        assert here(capsys, *command).code == 0
        held = bits(tmp_path / out)
        ran = here(capsys, *command)
        assert ran.code == 2
        assert "exists; use --force" in ran.err
        assert bits(tmp_path / out) == held
        assert here(capsys, *command, "--force").code == 0


def test_too_little_room(capsys, tmp_path, monkeypatch):
    save_file(layouts.tensors(WAN), tmp_path / "in.safetensors")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: disk.shutil._ntuple_diskusage(1000, 0, 1000))
    for out in ("out", "out.ckpt"):
        ran = here(capsys, "convert", tmp_path / "in.safetensors", tmp_path / out, "--to", "wan", HEADS)
        assert ran.code == 2
        assert "1 kB free" in ran.err
    assert {one.name for one in tmp_path.iterdir()} == {"in.safetensors"}


def test_a_disk_that_fills_up(tmp_path):
    """A file-size limit makes the write fail in the middle, as a full disk does."""
    save_file(layouts.tensors(WAN), tmp_path / "in.safetensors")
    program = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ultrazoo.cli import main\n"
        f"sys.exit(max(main(['convert', 'in.safetensors', out, '--to', 'wan', '{HEADS}']) != 2 "
        "for out in ('out', 'out.ckpt', 'out.safetensors')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("cannot write") == 3
    assert "Traceback" not in ran.stderr
    assert {one.name for one in tmp_path.iterdir()} == {"in.safetensors"}


def test_ctrl_c_in_the_middle(tmp_path):
    save_file(layouts.tensors(layouts.wan(3, dim=1024)), tmp_path / "in.safetensors")
    process = start("convert", "in.safetensors", "out", "--to", "diffusers", "backbone.heads=8", cwd=tmp_path)
    half_way(process, tmp_path)
    out, err = interrupt(process, signal.SIGINT)
    assert process.returncode == 130, err
    assert err.rstrip().endswith("interrupted")
    assert out == ""
    assert {one.name for one in tmp_path.iterdir()} == {"in.safetensors"}
