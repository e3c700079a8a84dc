"""The settings of a model in a folder of its own library: which file they are in, and what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import Problem
from ..options import got

CONFIG = "config.json"


def settings_at(path: Path, key: str, inside: Sequence[str] = ()) -> tuple[Path | None, dict[str, Any], list[Problem]]:
    """The config.json that `path` means (itself, in it, or in a folder `inside` it) and its content; problems under `key`."""
    places = [path, path / CONFIG, *(path / one / CONFIG for one in inside)]
    place = next((one for one in places if one.is_file()), None)
    if place is None:
        names = " nor ".join([CONFIG, *(f"{one}/{CONFIG}" for one in inside)])
        rule = f"{path} is not there" if not path.exists() else f"{path} does not hold {names}"
        folder = "a model's folder, a pipeline's," if inside else "a model's folder"
        return None, {}, [Problem(key, rule, f"give {folder} or a {CONFIG}")]
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, {}, [Problem(key, f"{place} cannot be read as JSON: {error}")]
    if not isinstance(content, dict):
        return None, {}, [Problem(key, f"{place} holds {got(content)}, not a model's settings")]
    return place, content, []
