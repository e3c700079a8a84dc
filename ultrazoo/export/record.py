"""``export.json``: what an exported file is, how it was made, what was proved of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UsageError
from ..ports import Port
from ..weights.staging import EXPORTED, MARK
from .targets import target_of

FILE = EXPORTED
SCHEMA = 1
UNVERIFIED = ".unverified"
"""What the name of a file ends in whose proof did not hold."""

DUE: Mapping[str, type] = {
    **dict.fromkeys(("target", "name", "hash", "dtype", "kind", "device", "file"), str),
    **dict.fromkeys(("bounds", "weights", "recipe", "files", "proof", "interior"), dict),
    **dict.fromkeys(("inputs", "plugins"), list),
    "schema": int,
}
"""What export.json must hold, with its types."""


def ports_data(ports: Sequence[Port]) -> list[dict[str, Any]]:
    def plain(size: int | tuple[str, int]) -> Any:
        return list(size) if isinstance(size, tuple) else size

    return [
        {"name": one.name, "shape": [plain(size) for size in one.shape], "kind": one.kind, "below": one.below}
        for one in ports
    ]


def ports_from(data: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
    """Ports as `ports_data` wrote them."""
    return tuple(
        Port(
            one["name"],
            tuple(size if isinstance(size, int) else (size[0], size[1]) for size in one["shape"]),
            one["kind"],
            one["below"],
        )
        for one in data
    )


def text(content: Mapping[str, Any]) -> bytes:
    whole = {MARK: __version__, "schema": SCHEMA, **content}
    return (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """The content of export.json; raises UsageError where there is none of ours."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no {FILE}: keep an exported file in the directory that `ultrazoo export` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or MARK not in content:
        raise UsageError(f"{path} was not written by ultrazoo")
    if isinstance(content.get("schema"), int) and content["schema"] > SCHEMA:
        raise UsageError(
            f"{path} has schema {content['schema']}, this ultrazoo {__version__} knows {SCHEMA}; upgrade ultrazoo"
        )
    broken = [key for key, kind in DUE.items() if not isinstance(content.get(key), kind)]
    if broken:
        raise UsageError(f"{path} is damaged: {', '.join(broken)} missing or of the wrong type; export again")
    return content


def opened(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The directory of an exported file and its export.json, given the directory or the file. Raises UsageError."""
    place = Path(path)
    if not place.exists():
        raise UsageError(f"{place}: no such file; give the directory that `ultrazoo export` wrote, or the file in it")
    if place.is_dir():
        return place, read(place)
    target_of(place)
    content = read(place.parent)
    if place.name.removesuffix(UNVERIFIED) != content["file"]:
        raise UsageError(f"{place} is not the file that {place.parent / FILE} speaks of, {content['file']}")
    return place.parent, content


def digest(path: Path) -> str:
    """Sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_whole(folder: Path, content: Mapping[str, Any]) -> None:
    """Raise UsageError for files that are missing or not what was written."""
    for name, one in content["files"].items():
        path = folder / name
        unverified = folder / (name + UNVERIFIED)
        path = path if path.exists() else unverified
        if not path.exists():
            raise UsageError(f"{folder / name} is missing; export again")
        if path.stat().st_size != one["bytes"]:
            raise UsageError(
                f"{path} is damaged: it has {path.stat().st_size} bytes, {one['bytes']} were written; export again"
            )
        if digest(path) != one["sha256"]:
            raise UsageError(f"{path} is damaged: its content is not what was written; export again")
