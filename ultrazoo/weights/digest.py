"""Digests of weights: of a file as it stands, and of the tensors whatever file, order or layout holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ..errors import WeightsError
from .keymaps import Format
from .reader import Checkpoint
from .writer import raw

READ_BYTES = 1 << 22

Count = Callable[[int, str], None]
"""Called with the bytes just read and what they belong to."""


def of_file(path: Path, count: Count | None = None) -> str:
    """SHA-256 of a file in hexadecimal; raises WeightsError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                if count is not None:
                    count(len(piece), path.name)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def of_tensors(checkpoint: Checkpoint, form: Format | None, prefix: str, count: Count | None = None) -> str:
    """SHA-256 over one line per tensor, sorted by our name of it: name, type, shape, SHA-256 of its bytes.

    Two checkpoints have the same one exactly when they hold the same tensors, in whatever layout and however sharded. Keys
    that `form` does not know stand for themselves.
    """
    lines = []
    for key, entry in checkpoint.entries.items():
        name = (form.ours(key[len(prefix) :]) if form is not None else None) or key
        digest = hashlib.sha256()
        for piece in raw(checkpoint.tensor(key)):
            digest.update(piece)
        dtype = str(entry.dtype).removeprefix("torch.")
        lines.append(f"{name} {dtype} {list(entry.shape)} {digest.hexdigest()}\n")
        if count is not None:
            count(entry.nbytes, key)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
