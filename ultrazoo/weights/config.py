"""``config.json``: what a directory holds, what made it, and what is needed to open it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, registry
from ..errors import RegistryError, UsageError, WeightsError
from .staging import MARK
from .writer import Written

FILE = "config.json"
SCHEMA = 1


def make(
    plan: Any, written: Sequence[Written], dtypes: Sequence[str], origin: Mapping[str, Any], parts: str = "all"
) -> bytes:
    """The text of config.json for a plan and the weight files written beside it.

    `origin` says where the numbers come from: the seed of fresh ones, and the report of those that were loaded. `parts`
    is ``new`` where the files hold the design's parameters alone.
    """
    resolved = plan.resolved
    content = {
        MARK: __version__,
        "schema": SCHEMA,
        "name": plan.name,
        "hash": plan.hash,
        "backbone": resolved.backbone.name,
        "recipe": resolved.data(),
        "plugins": [dict(plugin) for plugin in resolved.plugins],
        "weights": {
            "format": "ultrazoo",
            "files": [one.data() for one in written],
            "parameters": plan.totals.parameters if parts == "all" else sum(one.parameters for one in written),
            **({"parts": parts} if parts != "all" else {}),
            "dtypes": sorted(dtypes),
        },
        "origin": dict(origin),
        "torch": torch.__version__,
    }
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read(directory: Path) -> dict[str, Any]:
    """The content of config.json; raises UsageError when `directory` was not written by ultrazoo."""
    path = directory / FILE
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; models are opened from local directories only")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{directory} holds no {FILE}: it is not a model that ultrazoo wrote") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    due = {MARK: str, "schema": int, "hash": str, "recipe": dict, "plugins": list, "origin": dict, "weights": dict}
    if not isinstance(content, dict) or MARK not in content:
        raise UsageError(f"{path} was not written by ultrazoo; load foreign checkpoints by `weights:` in a recipe")
    broken = [key for key, kind in due.items() if not isinstance(content.get(key), kind)]
    if broken:
        raise UsageError(f"{path} is damaged: {', '.join(broken)} missing or of the wrong type")
    if content["schema"] > SCHEMA:
        raise UsageError(
            f"{path} has schema {content['schema']}, this ultrazoo {__version__} knows {SCHEMA}; upgrade ultrazoo"
        )
    return content


def holds_new(content: Mapping[str, Any]) -> bool:
    """Whether a config.json stands beside the parameters of a design alone."""
    return bool(content["weights"].get("parts") == "new")


def require_plugins(directory: Path, plugins: Sequence[Mapping[str, Any]]) -> None:
    """Raise RegistryError with the pip line for every plugin that `directory` needs and that is not installed."""
    lacking: list[tuple[Mapping[str, Any], str]] = []
    for plugin in plugins:
        try:
            registry.find(str(plugin["kind"]), str(plugin["name"]))
        except RegistryError as error:
            lacking.append((plugin, str(error)))
    if not lacking:
        return
    lines = [f"{directory} needs plugins that are not there"]
    for plugin, cause in lacking:
        distribution, version = plugin.get("distribution", ""), plugin.get("version", "")
        if distribution.startswith("("):
            advice = "it was registered by a program, not by a package: register it before you open the model"
        else:
            wanted = f"{distribution}=={version}" if version else distribution
            advice = f"pip install {wanted!r}"
        lines.append(f"  {plugin['kind']} {plugin['name']}   {advice}")
        lines.append(f"    {cause}")
    raise RegistryError("\n".join(lines))


def require_files(directory: Path, weights: Mapping[str, Any]) -> None:
    """Raise WeightsError unless the weight files are there with the sizes that were written."""
    for row in weights.get("files", []):
        path = directory / str(row["file"])
        if not path.is_file():
            raise WeightsError(f"{directory} lacks {row['file']}, which its {FILE} names")
        size = path.stat().st_size
        if size != row["bytes"]:
            raise WeightsError(f"{path} has {size} bytes, {row['bytes']} were written: it is damaged or cut short")
