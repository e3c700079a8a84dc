"""Open a checkpoint without reading it: a file, a directory, an index of shards, a torch pickle of tensors.

`open_checkpoint` finds the files, checks that they are whole and belong together, and gives tensors one at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightsError, listed
from . import pickled
from .tensors import DTYPES, Entry

INDEX = ".safetensors.index.json"


class Checkpoint:
    """Tensors by key, read when asked for. `entries` are the facts of all of them; `metadata` of the (first) file.

    Use as a context manager or call `close`.
    """

    def __init__(self, path: Path, files: list[Path], entries: dict[str, Entry], metadata: dict[str, str]):
        self.path = path
        self.files = files
        self.entries = entries
        self.metadata = metadata

    def tensor(self, key: str) -> Tensor:
        """The tensor of `key` on the CPU; it may share memory with the file, so copy before writing into it."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the files."""

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Safetensors(Checkpoint):
    def __init__(self, path: Path, files: list[Path]):
        super().__init__(path, files, {}, {})
        self._file_of: dict[str, Any] = {}
        for number, file in enumerate(files):
            handle = _open_safetensors(file)
            if number == 0:
                self.metadata = dict(handle.metadata() or {})
            # a handle is no mapping: iterating over it is not offered by every version
            for key in handle.keys():  # noqa: SIM118
                if key in self.entries:
                    raise WeightsError(f"{path}: {key!r} stands in more than one file, the last is {file.name}")
                piece = handle.get_slice(key)
                kind = piece.get_dtype()
                if kind not in DTYPES:
                    raise WeightsError(f"{file}: {key!r} has element type {kind}; known are {listed(DTYPES)}")
                self.entries[key] = Entry(key, tuple(piece.get_shape()), DTYPES[kind])
                self._file_of[key] = handle

    def tensor(self, key: str) -> Tensor:
        return self._file_of[key].get_tensor(key)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._file_of.clear()


class _Pickled(Checkpoint):
    def __init__(self, path: Path):
        self._tensors = pickled.read(path)
        entries = {key: Entry(key, tuple(t.shape), t.dtype) for key, t in self._tensors.items()}
        super().__init__(path, [path], entries, {})

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]

    def close(self) -> None:
        self._tensors = {}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open weights at `path`.

    `path` is a ``.safetensors`` file, an index (``….safetensors.index.json``), a ``.ckpt``, ``.pt``, ``.pth`` or
    ``.bin`` file of tensors, or a directory that holds one safetensors checkpoint (directly, or in ``transformer/`` as
    diffusers pipelines do). Nothing is ever downloaded. Raises WeightsError.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _open_directory(place)
        if not place.exists():
            raise WeightsError(f"{place}: no such file or directory; weights are read from local files only")
        return _open_file(place)
    except OSError as error:
        raise WeightsError(f"cannot read {place}: {error.strerror or error}") from error


def _open_file(path: Path) -> Checkpoint:
    if path.name.endswith(INDEX):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _Safetensors(path, [path])
    if path.suffix in pickled.SUFFIXES:
        with path.open("rb"):  # a file that may not be read says so itself
            return _Pickled(path)
    raise WeightsError(
        f"{path}: unknown kind of file; known are .safetensors, *{INDEX}, {listed(pickled.SUFFIXES)} and directories"
    )


def _open_directory(directory: Path) -> Checkpoint:
    """The one checkpoint in a directory. Pickles in a directory are never picked up unasked."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    indices = [file for file in files if file.name.endswith(INDEX)]
    singles = [file for file in files if file.suffix == ".safetensors"]
    if indices:
        # a shard belongs to its index, any other single file is a second checkpoint
        shards = {name for index in indices for name in set(_weight_map(index).values())}
        singles = [file for file in singles if file.name not in shards]
    found = indices + singles
    if len(found) > 1:
        raise WeightsError(
            f"{directory} holds several checkpoints, {listed(f.name for f in found)}; give the one you mean"
        )
    if found:
        return _open_file(found[0])
    if (directory / "transformer").is_dir():
        return _open_directory(directory / "transformer")
    loose = [file.name for file in files if file.suffix in pickled.SUFFIXES]
    hint = f"; it holds {listed(loose)}: give the file you mean" if loose else ""
    raise WeightsError(f"{directory} holds no .safetensors file and no index{hint}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{index} is not JSON: {error}") from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise WeightsError(f"{index} is not an index of shards: it has no weight_map of keys to file names")
    for name in set(table.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index} names {name!r}; shards are .safetensors files in the same directory")
    return table


def _open_index(index: Path) -> Checkpoint:
    table = _weight_map(index)
    files = [index.parent / name for name in sorted(set(table.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise WeightsError(f"{index} names {listed(absent[:4])}, which {'is' if len(absent) == 1 else 'are'} not there")
    checkpoint = _Safetensors(index, files)
    lost = sorted(set(table) - set(checkpoint.entries))
    extra = sorted(set(checkpoint.entries) - set(table))
    if lost or extra:
        which = (
            f"{lost[0]!r} is in the index and in no shard" if lost else f"{extra[0]!r} is in a shard, not in the index"
        )
        raise WeightsError(
            f"{index} and its shards do not belong together: {which} ({len(lost) + len(extra)} such keys)"
        )
    return checkpoint


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged, cut short or not a safetensors file: {error}") from error
