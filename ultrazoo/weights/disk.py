"""Writing to disks that may be full, read-only or somebody else's: what can go wrong said in one line, without torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

MARGIN_BYTES = 64 * 1024
"""Room kept for directory entries and block rounding when free space is checked."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small new file and flush it to the disk; raises OutputError."""
    with disk_errors(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_space(directory: Path, need: int) -> None:
    """Raise OutputError unless the file system of `directory` has `need` bytes free for us."""
    free = shutil.disk_usage(directory).free
    if free < need + MARGIN_BYTES:
        raise OutputError(
            f"{directory} has {human(free)} free, {human(need)} are needed; free some or choose another place with -o"
        )


@contextlib.contextmanager
def disk_errors(path: Path | str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(explain(path, error)) from error


def explain(path: Path | str | os.PathLike[str], error: OSError) -> str:
    """One line for a failed write."""
    causes = {
        errno.ENOSPC: "the disk is full; free some space or choose another place with -o",
        errno.EFBIG: "files may not be so large here; choose another place with -o",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another place with -o",
        errno.EACCES: "permission denied; choose a place you may write to with -o",
        errno.EPERM: "not permitted; choose a place you may write to with -o",
        errno.EROFS: "the file system is read-only; choose another place with -o",
        errno.ENOTDIR: "a part of this path is a file, not a directory",
        errno.ENAMETOOLONG: "the name is too long",
    }
    cause = causes.get(error.errno or 0, error.strerror or str(error))
    return f"cannot write {path}: {cause}"


def human(count: int) -> str:
    """Bytes for people, in powers of ten: ``2.84 GB``."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
