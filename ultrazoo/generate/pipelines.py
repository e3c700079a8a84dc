"""Opening a pipeline's folder: local files alone, every component there, of a family that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, listed
from ..weights.reader import open_checkpoint
from .families import BY_PIPELINE, Family

INDEXES = ("model_index.json", "modular_model_index.json")


def described(directory: str | Path) -> tuple[Family, dict[str, Any]]:
    """The family of a pipeline's folder and its index. Raises UsageError when it is none, incomplete or unknown."""
    place = Path(directory)
    index = next((place / name for name in INDEXES if (place / name).is_file()), None)
    if index is None:
        why = "does not exist" if not place.exists() else f"holds none of {listed(INDEXES)}"
        raise UsageError(f"{place} is not a pipeline's folder: it {why}")
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{index} cannot be read as JSON: {error}") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if name not in BY_PIPELINE:
        raise UsageError(f"{index}: pipeline class {name!r} is not one that generate knows: {listed(BY_PIPELINE)}")
    missing = [part for part in components(content) if not (place / part).is_dir()]
    if missing:
        raise UsageError(f"{place}: the folder of component {listed(missing)} is missing, which {index.name} names")
    return BY_PIPELINE[name], content


def components(index: dict[str, Any]) -> list[str]:
    """Names of the components that an index says are there."""
    rows = {name: row for name, row in index.items() if isinstance(row, list) and not name.startswith("_")}
    return [name for name, row in rows.items() if len(row) >= 2 and row[1] is not None]


def weight_elements(directory: str | Path, index: dict[str, Any]) -> dict[str, int]:
    """Numbers held by each component's checkpoint, read from the files' headers."""
    found = {}
    for name in components(index):
        folder = Path(directory) / name
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            continue
        total = 0
        for file in files:
            with open_checkpoint(file) as checkpoint:
                total += sum(_numel(entry.shape) for entry in checkpoint.entries.values())
        found[name] = total
    return found


def _numel(shape: Any) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


DECODERS = ("vae", "audio_vae", "vocoder", "scheduler")


def open_pipeline(directory: str | Path, dtype: torch.dtype, *, decoders_only: bool = False) -> tuple[Any, Family]:
    """The pipeline of a local folder, its components in `dtype`, and its family. Nothing is downloaded.

    `decoders_only` leaves out everything that sampling needs and decoding does not.

    Raises UsageError with the cause when a component cannot be loaded.
    """
    family, index = described(directory)
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"diffusers cannot be imported ({error}); pip install 'ultrazoo[diffusers]'") from error
    name = index["_class_name"]
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UsageError(f"diffusers {diffusers.__version__} has no {name}; upgrade it")
    # the argument was called torch_dtype before diffusers 0.42
    kind = {"dtype" if _version(diffusers.__version__) >= (0, 42) else "torch_dtype": dtype}
    _quiet()
    try:
        if issubclass(cls, diffusers.ModularPipeline):
            pipeline = cls.from_pretrained(str(directory), local_files_only=True)
            names = [one for one in DECODERS if one in components(index)] if decoders_only else None
            pipeline.load_components(names=names, local_files_only=True, **kind)
        else:
            left = [one for one in components(index) if one not in DECODERS] if decoders_only else []
            pipeline = cls.from_pretrained(str(directory), local_files_only=True, **kind, **dict.fromkeys(left))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"{directory}: {name} cannot be opened: {_first(error)}") from error
    for part in ("vae", "scheduler") if decoders_only else ("vae", "scheduler", "transformer"):
        if getattr(pipeline, part, None) is None:
            raise UsageError(f"{directory}: this pipeline has no {part}, which generate needs")
    return pipeline, family


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _quiet() -> None:
    """No loading bars: what is worth saying is said by the verb."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
