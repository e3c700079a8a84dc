"""The streaming writer against the safetensors library, and what happens when the disk says no."""

from __future__ import annotations

import errno
import hashlib
import json
import tracemalloc
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ultrazoo.errors import OutputError
from ultrazoo.weights import disk, writer
from ultrazoo.weights.disk import write_bytes
from ultrazoo.weights.tensors import Entry
from ultrazoo.weights.writer import order, shards, write_checkpoint


def entries_of(tensors):
    return [Entry(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(directory, tensors, **options):
    entries = entries_of(tensors)
    pairs = ((entry.name, tensors[entry.name]) for entry in order(entries))
    return write_checkpoint(directory, entries, pairs, **options)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def mixed():
    return {
        "a.half": torch.randn(3, 5).to(torch.bfloat16),
        "b.odd": torch.randn(7).to(torch.float16),
        "c": torch.randn(2, 3, 4),
        "d.scalar": torch.tensor(2.5, dtype=torch.float64),
        "e.none": torch.empty(0, 4),
        "f.flag": torch.tensor([True, False, True]),
        "g.int": torch.arange(-3, 3),
        "h.transposed": torch.randn(4, 6).t(),
        "i.ünï": torch.tensor([float("nan"), -0.0, float("inf")]),
    }


def test_the_library_reads_back_every_bit(tmp_path, mixed):
    (written,) = write(tmp_path, mixed, metadata={"ultrazoo": "1"})
    got = load_file(tmp_path / "model.safetensors")
    assert set(got) == set(mixed)
    assert all(same(got[name], tensor) for name, tensor in mixed.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ultrazoo": "1"}
    data = (tmp_path / "model.safetensors").read_bytes()
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.nbytes == len(data)
    assert written.parameters == sum(t.numel() for t in mixed.values())


def test_wide_types_come_first_so_that_every_tensor_is_aligned(tmp_path, mixed):
    write(tmp_path, mixed)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    table = json.loads(data[8 : 8 + length])
    for name, tensor in mixed.items():
        assert table[name]["data_offsets"][0] % tensor.element_size() == 0


def test_shards_and_index(tmp_path):
    tensors = {f"layer.{i}": torch.randn(10) for i in range(5)}
    written = write(tmp_path, tensors, limit=80)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [one.file for one in written] == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert list(index["weight_map"]) == sorted(tensors)
    for name, file in index["weight_map"].items():
        assert same(load_file(tmp_path / file)[name], tensors[name])


def test_a_tensor_larger_than_the_limit_stands_alone():
    entries = [Entry("a", (4,), torch.float32), Entry("b", (100,), torch.float32), Entry("c", (4,), torch.float32)]
    assert [[e.name for e in group] for group in shards(entries, limit=100).values()] == [["a"], ["b"], ["c"]]
    assert list(shards(entries, limit=1000)) == ["model.safetensors"]


def test_progress_counts_bytes_over_all_shards(tmp_path):
    seen = []
    write(tmp_path, {f"x{i}": torch.zeros(10) for i in range(4)}, limit=80, progress=lambda *row: seen.append(row))
    assert seen == [(40, 160, "x0"), (80, 160, "x1"), (120, 160, "x2"), (160, 160, "x3")]


def test_no_two_tensors_are_alive_at_once(tmp_path):
    size = 1 << 20
    entries = [Entry(f"t{i}", (size,), torch.float32) for i in range(12)]
    made = []
    alive = []

    def make():
        for entry in entries:
            alive.append(sum(reference() is not None for reference in made))
            tensor = torch.ones(entry.shape)
            made.append(weakref.ref(tensor))
            yield entry.name, tensor
            del tensor

    tracemalloc.start()
    write_checkpoint(tmp_path, entries, make())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # the generator and the writer may both still hold the last one
    assert max(alive) <= 1
    # Python's own memory: no bytes object of a tensor is ever made
    assert peak < 4 * size


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: disk.shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OutputError, match=r"100 B free, .* needed"):
        write(tmp_path, {"a": torch.zeros(1000)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write(tmp_path, {"a": torch.zeros(10)})
    assert calls


def test_small_files_are_never_overwritten(tmp_path):
    write_bytes(tmp_path / "a", b"1")
    with pytest.raises(OutputError, match="exists"):
        write_bytes(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_type_that_safetensors_cannot_hold(tmp_path):
    with pytest.raises(OutputError, match="complex64 of 'a'"):
        write(tmp_path, {"a": torch.zeros(3, dtype=torch.complex64)})


def test_two_tensors_of_one_name(tmp_path):
    entry = Entry("a", (1,), torch.float32)
    with pytest.raises(OutputError, match="two tensors"):
        write_checkpoint(tmp_path, [entry, entry], iter([]))
