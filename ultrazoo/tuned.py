"""Measured orders of kernels, in the user's cache: written by ``ultrazoo list kernels --tune``, read by the kernel door.

One JSON file. A measured order holds for the device, the torch version, the dtype, the head size and the kind of call
(``dense``, ``blocks`` or ``blocks of single queries``) that it was measured for, and for nothing else.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

NAME = "kernels.json"


def path() -> Path:
    """Where measured orders are kept: in ``$ULTRAZOO_CACHE``, else in ``ultrazoo`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("ULTRAZOO_CACHE")
    if own:
        return Path(own) / NAME
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ultrazoo" / NAME


def key(device: str, torch_version: str, dtype: str, head_dim: int, call: str) -> str:
    """What an order holds for."""
    return f"{device} | torch {torch_version} | {dtype} | head size {head_dim} | {call}"


@lru_cache(maxsize=4)
def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == 1 else {}


def load() -> Mapping[str, Any]:
    """The file's content: ``{"schema": 1, "measured": date, "orders": {key: [kernel, …]}}``; empty where there is none."""
    return _read(path())


def order_of(wanted: str) -> tuple[str, ...]:
    """Kernels measured for a `key`, fastest first; none where nothing was measured."""
    orders = load().get("orders", {})
    return tuple(orders.get(wanted, ()))


def save(measured: str, orders: Mapping[str, Sequence[str]]) -> Path:
    """Write orders beside those of other keys, whole or not at all. Raises OSError."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = dict(load().get("orders", {}))
    content = {"schema": 1, "measured": measured, "orders": kept | {name: list(row) for name, row in orders.items()}}
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{NAME}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _read.cache_clear()
    return file


def forget() -> bool:
    """Delete every measured order; False where there was none."""
    _read.cache_clear()
    file = path()
    if not file.is_file():
        return False
    file.unlink()
    return True


def summary() -> dict[str, Any]:
    """What a plan records: whether kernels follow the fixed order or measured ones, and which."""
    found = load()
    if not found:
        return {"order": "fixed"}
    return {"order": "measured", "measured": found.get("measured", ""), "orders": dict(found.get("orders", {}))}
