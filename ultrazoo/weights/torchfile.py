"""Write a ``.ckpt`` of plain tensors one tensor at a time, as ``torch.save`` of a state dict would lay it out.

Such a file is an uncompressed zip archive: ``data.pkl`` is the pickled dict, whose tensors refer to storages by number,
and ``data/<number>`` are the storages, aligned to 64 bytes. ``torch.save`` wants every tensor at once; here the pickle is
made from shapes and types alone, and the numbers follow as they are made.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import OutputError
from .disk import disk_errors
from .tensors import Entry
from .writer import Written, checked, raw

ROOT = "archive"
ALIGNMENT = 64
LOCAL_HEADER_BYTES, ZIP64_BYTES = 30, 20

_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


def write_torch_file(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterator[tuple[str, Tensor]],
    *,
    report: Callable[[int, str], None] | None = None,
) -> Written:
    """Write one file with the tensors of the iterator, which come in the order of `entries`; it is flushed to the disk.

    Raises OutputError when the place cannot be written, or for an element type that torch has no storage class of.
    """
    for entry in entries:
        if entry.dtype not in _STORAGES:
            raise OutputError(f"{path.name}: torch files hold no {entry.dtype} ({entry.name!r}); write .safetensors")
    done = 0
    with disk_errors(path), path.open("xb", buffering=0) as file:
        sink = _Sink(file)
        # a stream that cannot seek: sizes and checksums follow the data, so nothing is patched and the digest holds
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[arg-type]
            _record(archive, sink, "data.pkl", [_pickled(entries)])
            _record(archive, sink, "byteorder", [b"little"])
            for number, entry in enumerate(entries):
                name, tensor = next(tensors)
                checked(entry, name, tensor)
                _record(archive, sink, f"data/{number}", raw(tensor), entry.nbytes)
                done += entry.nbytes
                if report is not None:
                    report(done, name)
                del tensor
            _record(archive, sink, "version", [b"3\n"])
        os.fsync(file.fileno())
    return Written(path.name, len(entries), sum(e.numel for e in entries), sink.position, sink.digest.hexdigest())


class _Sink:
    """The writing half of a file: counts and hashes what passes."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.position = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.position += len(view)
        size = len(view)
        while view:
            view = view[self._file.write(view) :]
        return size

    def flush(self) -> None:
        """Nothing is held back."""


def _record(
    archive: zipfile.ZipFile, sink: _Sink, name: str, pieces: Iterator[memoryview] | Sequence[bytes], size: int = 0
) -> None:
    """One record, its data at a multiple of the alignment."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}", (1980, 1, 1, 0, 0, 0))
    large = size * 1.05 > zipfile.ZIP64_LIMIT
    before = sink.position + LOCAL_HEADER_BYTES + len(info.filename) + (ZIP64_BYTES if large else 0)
    padding = -(before + 4) % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding
    with archive.open(info, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)


class _Storage:
    """Stands for a storage in the pickle: its number, type and length."""

    def __init__(self, number: int, entry: Entry):
        self.reference = ("storage", _STORAGES[entry.dtype], str(number), "cpu", entry.numel)


class _Stand:
    """Pickles as a contiguous tensor over the whole of one storage."""

    def __init__(self, number: int, entry: Entry):
        self._number, self._entry = number, entry

    def __reduce__(self) -> tuple[Any, ...]:
        shape, stride, step = self._entry.shape, [], 1
        for length in reversed(shape):
            stride.insert(0, step)
            step *= max(length, 1)
        storage = _Storage(self._number, self._entry)
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, tuple(stride), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


def _pickled(entries: Sequence[Entry]) -> bytes:
    buffer = io.BytesIO()
    content = {entry.name: _Stand(number, entry) for number, entry in enumerate(entries)}
    if len(content) != len(entries):
        raise OutputError("two tensors have one name")
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()
