"""A directory that appears whole or not at all.

Files are written into a hidden work directory beside the target, ``.<name>.ultrazoo-<token>/new``, which is renamed to
the target when it is complete. The work directory holds a lock file that its process keeps locked; the system drops
the lock when the process dies, however it dies, so a later build can tell a killed one from a running one and clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError
from .disk import disk_errors

MARK = "ultrazoo"
"""Key of config.json by which a directory is known as one of ours."""

EXPORTED = "export.json"
"""The file by which a directory is known to hold an exported model."""

CONVERTED = "_ultrazoo"
"""The same for directories in the layout of another program, which ignores keys with an underscore."""


@contextlib.contextmanager
def staged(out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give an empty directory to fill; on a clean exit it becomes `out`, on any exception nothing is left of it.

    An existing `out` is refused unless `force`; then it must be empty or a directory that we wrote, and it is replaced
    only once the new one is complete. Raises OutputError.
    """
    target = Path(os.path.realpath(out))
    refuse_existing(target, force)
    made = _make_parents(target.parent)
    try:
        with disk_errors(out):
            clean_stale(target)
            # a killed replacement may just have been put back
            refuse_existing(target, force)
            work, lock = _open_work(target)
        try:
            with disk_errors(out):
                new = work / "new"
                new.mkdir()
            yield new
            with disk_errors(out):
                _sync_tree(new)
                _swap(new, target, work / "old", force)
                _sync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)
    except BaseException:
        _remove_empty(made)
        raise


@contextlib.contextmanager
def staged_file(out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give a path to write one file at; on a clean exit it becomes `out`, on any exception nothing is left of it.

    An existing file is refused unless `force`. Raises OutputError.
    """
    target = Path(os.path.realpath(out))
    _refuse_file(target, force)
    made = _make_parents(target.parent)
    try:
        with disk_errors(out):
            clean_stale(target)
            work, lock = _open_work(target)
        try:
            yield work / target.name
            with disk_errors(out):
                _refuse_file(target, force)
                (work / target.name).replace(target)
                _sync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)
    except BaseException:
        _remove_empty(made)
        raise


def _refuse_file(target: Path, force: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{target} is a directory; choose another place")
    if target.exists() and not force:
        raise OutputError(f"{target} exists; use --force to replace it, or choose another place")


def refuse_existing(target: Path, force: bool) -> None:
    """Raise OutputError when `target` is in the way."""
    try:
        exists = target.exists() or target.is_symlink()
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
    if not exists:
        return
    if not target.is_dir():
        raise OutputError(f"{target} exists and is not a directory; choose another place with -o")
    if not force:
        raise OutputError(f"{target} exists; use --force to replace it, or choose another place with -o")
    known = is_ours(target) or _has(target, CONVERTED) or _has(target, MARK, EXPORTED)
    if not known and any(target.iterdir()):
        raise OutputError(
            f"{target} was not written by ultrazoo: --force does not replace it; remove it yourself first"
        )


def is_ours(directory: Path) -> bool:
    """Does `directory` hold a config.json that ultrazoo wrote for a model of its own?"""
    return _has(directory, MARK)


def _has(directory: Path, key: str, name: str = "config.json") -> bool:
    try:
        config = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and key in config


def clean_stale(target: Path) -> list[Path]:
    """Remove the work directories that killed builds of `target` left; returns them.

    A build that was killed between the two renames of a replacement has moved the old directory away: it is put back.
    """
    cleaned = []
    for work in sorted(target.parent.glob(f"{_escape(_prefix(target))}*")):
        lock = _try_lock(work)
        if lock is None:
            continue
        try:
            old = work / "old"
            if old.is_dir() and not target.exists():
                old.rename(target)
            shutil.rmtree(work, ignore_errors=True)
            cleaned.append(work)
        finally:
            os.close(lock)
    return cleaned


def _prefix(target: Path) -> str:
    return f".{target.name}.ultrazoo-"


def _escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _open_work(target: Path) -> tuple[Path, int]:
    """A new work directory and the descriptor that locks it."""
    while True:
        work = target.parent / f"{_prefix(target)}{secrets.token_hex(6)}"
        work.mkdir()
        path = work / "lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        # another build's clean-up may have taken the lock between the two calls and removed the directory
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                return work, lock
        os.close(lock)


def _try_lock(work: Path) -> int | None:
    """Lock a work directory whose process is dead; None when it lives or cannot be read."""
    path = work / "lock"
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        # killed, or caught, between making the directory and its lock
        if not work.is_dir() or time.time() - work.stat().st_mtime < 60:
            return None
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _swap(new: Path, target: Path, old: Path, force: bool) -> None:
    """Rename old away and new into place; the old one comes back if the second rename fails."""
    if not force:
        if target.exists():
            raise OutputError(f"{target} was made by another process meanwhile; use --force to replace it")
        new.rename(target)
        return
    replaced = target.exists()
    if replaced:
        refuse_existing(target, force)
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Make missing parents; returns those made, deepest first, so that a failure can take them back."""
    missing = []
    place = parent
    with disk_errors(parent):
        while not place.exists():
            missing.append(place)
            place = place.parent
        if not place.is_dir():
            raise OutputError(f"cannot write below {place}: it is a file, not a directory")
        parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return


def _sync_tree(directory: Path) -> None:
    for root, _, _ in os.walk(directory):
        _sync(Path(root))


def _sync(directory: Path) -> None:
    """Flush a directory's entries; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
