"""Write safetensors files one tensor at a time.

A safetensors file is an 8-byte little-endian length, a JSON header with every tensor's type, shape and place, and the
bytes. The header needs shapes only, so it is written first and the tensors follow as they are made: the model is never
in memory, however large it is. Above `SHARD_BYTES` the tensors are spread over several files with an index, in the
layout that Hugging Face's tools read.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OutputError
from .disk import check_space, disk_errors, write_bytes
from .tensors import NAMES, Entry

SHARD_BYTES = 4 * 10**9
"""Tensor bytes in one file at most; a single larger tensor gets a file of its own."""

WRITE_BYTES = 1 << 24

Progress = Callable[[int, int, str], None]
"""Called as ``progress(bytes done, bytes in all, key)`` after each tensor."""


@dataclass(frozen=True)
class Written:
    """What one file holds: tensor bytes, size on disk and SHA-256 of the file."""

    file: str
    tensors: int
    parameters: int
    nbytes: int
    sha256: str

    def data(self) -> dict[str, object]:
        return {"file": self.file, "bytes": self.nbytes, "sha256": self.sha256}


def shards(entries: Sequence[Entry], stem: str = "model", limit: int = SHARD_BYTES) -> dict[str, list[Entry]]:
    """File name → its tensors, in the order given; one file named ``<stem>.safetensors`` where everything fits."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_checkpoint(
    directory: Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
    limit: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Written]:
    """Write `tensors` into `directory` as one file, or as shards and an index; returns what was written.

    `tensors` yields (key, tensor) in the order that `order` gives for `entries`; each is dropped once it is on disk.
    Raises OutputError when the place is full or not writable; files written so far stay, for the caller to remove with
    the directory.
    """
    need = sum(entry.nbytes for entry in entries) + header_room(entries)
    check_space(directory, need)
    source = iter(tensors)
    total = sum(entry.nbytes for entry in entries)
    done = 0
    written = []
    files = shards(order(entries), stem, limit)
    for file, group in files.items():
        before = done

        def report(bytes_done: int, key: str, before: int = before) -> None:
            if progress is not None:
                progress(before + bytes_done, total, key)

        written.append(write_file(directory / file, group, source, metadata=metadata, report=report))
        done += sum(entry.nbytes for entry in group)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {entry.name: file for file, group in files.items() for entry in group},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_bytes(directory / f"{stem}.safetensors.index.json", text.encode())
    return written


def order(entries: Sequence[Entry]) -> list[Entry]:
    """The order in which tensors are stored: wide element types first, so that each stays aligned; else as given."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def header_room(entries: Sequence[Entry]) -> int:
    """An upper bound of the bytes that headers and an index take."""
    return 4096 + sum(2 * len(entry.name.encode()) + 160 for entry in entries)


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header of a file that stores `entries` in this order, padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for entry in entries:
        if entry.dtype not in NAMES:
            raise OutputError(f"safetensors has no name for {entry.dtype} of {entry.name!r}")
        if entry.name in table:
            raise OutputError(f"two tensors are named {entry.name!r}")
        table[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterator[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    report: Callable[[int, str], None] | None = None,
) -> Written:
    """Write one file with the next ``len(entries)`` tensors of the iterator, flushed to the disk before it returns."""
    digest = hashlib.sha256()
    size = 0
    done = 0
    with disk_errors(path), path.open("xb", buffering=0) as file:

        def put(piece: bytes | memoryview) -> None:
            nonlocal size
            digest.update(piece)
            view = memoryview(piece)
            while view:
                count = file.write(view)
                view = view[count:]
                size += count or 0

        put(header(entries, metadata))
        for entry in entries:
            name, tensor = next(tensors)
            checked(entry, name, tensor)
            for piece in raw(tensor):
                put(piece)
            done += entry.nbytes
            if report is not None:
                report(done, name)
            del tensor
        os.fsync(file.fileno())
    return Written(path.name, len(entries), sum(e.numel for e in entries), size, digest.hexdigest())


def raw(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor, little-endian, in pieces of at most 16 MiB; copies nothing when it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), WRITE_BYTES):
        yield flat[start : start + WRITE_BYTES].numpy().data


def checked(entry: Entry, name: str, tensor: Tensor) -> None:
    """What a stream gives must be what the header, which was written before, says."""
    got = (name, tuple(tensor.shape), tensor.dtype)
    due = (entry.name, entry.shape, entry.dtype)
    assert got == due, f"the tensor to write is {got}, the header says {due}"
