"""Opening a pipeline's folder: local files alone, every component there, of a family that is known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import inplace
from ..errors import UsageError, listed, near
from ..weights.reader import open_checkpoint
from .families import BY_PIPELINE, Family

LIBRARIES = ("diffusers", "transformers", "ltx2")
"""Where parts may come from; ``ltx2`` is diffusers' own folder of that pipeline, where its parts have no other name."""

SAMPLES = 64
SAMPLE_BYTES = 4096

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
    if not isinstance(content, dict):
        raise UsageError(f"{index} holds {type(content).__name__}, not the names of a pipeline's parts")
    name = content.get("_class_name")
    if not isinstance(name, str) or name not in BY_PIPELINE:
        hint = near(name, BY_PIPELINE) if isinstance(name, str) else ""
        raise UsageError(
            f"{index}: pipeline class {name!r} is not one that generate knows: {listed(BY_PIPELINE)}"
            + (f"; {hint}" if hint else "")
        )
    foreign = {
        part: library
        for part in components(content)
        for library in _libraries(content[part])
        if library not in LIBRARIES
    }
    if foreign:
        which = [f"{part} from {library!r}" for part, library in foreign.items()]
        raise UsageError(f"{index}: only parts of {listed(LIBRARIES)} are loaded, it names {listed(which)}")
    family = BY_PIPELINE[name]
    due = ("vae", "transformer", "scheduler", *(("audio_vae",) if family.audio else ()))
    lacking = [part for part in due if part not in components(content)]
    if lacking:
        raise UsageError(f"{index}: this {name} has no {listed(lacking)}, which generate needs")
    missing = [part for part in components(content) if not (place / part).is_dir()]
    if missing:
        raise UsageError(f"{place}: the folder of component {listed(missing)} is missing, which {index.name} names")
    # FLUX.2 Klein comes with guidance and with guidance in its weights
    return replace(family, distilled=True) if content.get("is_distilled") else family, content


def components(index: dict[str, Any]) -> list[str]:
    """Names of the components that an index says are there, without those that making pictures from words does not use."""
    family = BY_PIPELINE.get(index.get("_class_name", ""))
    unused = () if family is None else family.unused
    rows = {name: row for name, row in index.items() if isinstance(row, list) and not name.startswith("_")}
    return [name for name, row in rows.items() if len(row) >= 2 and row[1] is not None and name not in unused]


def _libraries(row: list[Any]) -> list[Any]:
    """Libraries that a component's row names: in a modular pipeline the class to load stands in its settings again."""
    hint = row[2].get("type_hint") if len(row) > 2 and isinstance(row[2], dict) else None
    return [row[0], *([hint[0]] if isinstance(hint, list) and hint else [])]


def weight_elements(directory: str | Path, index: dict[str, Any]) -> dict[str, int]:
    """Numbers held by each component's checkpoint, read from the files' headers."""
    found = {}
    for name in components(index):
        files = _weight_files(Path(directory) / name)
        if not files:
            continue
        total = 0
        for file in files:
            with open_checkpoint(file) as checkpoint:
                total += sum(_numel(entry.shape) for entry in checkpoint.entries.values())
        found[name] = total
    return found


def settings_of(directory: str | Path, part: str) -> dict[str, Any]:
    """What config.json of a component says. Raises UsageError where there is none, or it is none."""
    place = Path(directory) / part / "config.json"
    try:
        content = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{place} cannot be read as the settings of the {part}: {why}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{place} holds {type(content).__name__}, not the settings of the {part}")
    return content


def vae_digest(directory: str | Path) -> str:
    """What the pipeline's VAE is told by: its class and settings, without versions and paths; 64 hex digits."""
    return hashlib.sha256(_told_by(directory, "vae")).hexdigest()


def transformers_digest(directory: str | Path) -> str:
    """What the pipeline's transformers are told by, without reading gigabytes; 64 hex digits.

    Their settings and, of each file of weights, its size and `SAMPLES` runs of bytes, evenly spread.
    """
    found = hashlib.sha256()
    for name in inplace.COMPONENTS:
        folder = Path(directory) / name
        if not folder.is_dir():
            continue
        found.update(_told_by(directory, name))
        for file in _weight_files(folder):
            size = file.stat().st_size
            found.update(f"{file.name} {size}".encode())
            with file.open("rb") as opened:
                for number in range(SAMPLES):
                    opened.seek(size * number // SAMPLES)
                    found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()


def _told_by(directory: str | Path, part: str) -> bytes:
    ignored = ("_diffusers_version", "_name_or_path")
    kept = {key: value for key, value in settings_of(directory, part).items() if key not in ignored}
    return json.dumps(kept, sort_keys=True).encode()


def _weight_files(folder: Path) -> list[Path]:
    """A second dot is a variant (model.fp16.safetensors) beside the weights that are loaded."""
    return [file for file in sorted(folder.glob("*.safetensors")) if "." not in file.stem]


def _numel(shape: Any) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


DECODERS = ("vae", "audio_vae", "vocoder", "scheduler")


def class_of(name: str) -> Any:
    """The pipeline class `name` of diffusers. Raises UsageError where diffusers, or this class in it, is not there."""
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"diffusers cannot be imported ({error}); pip install 'ultrazoo[diffusers]'") from error
    found = getattr(diffusers, name, None)
    if found is None:
        raise UsageError(f"diffusers {diffusers.__version__} has no {name}; upgrade it")
    return found


def open_pipeline(
    directory: str | Path, dtype: torch.dtype, *, decoders_only: bool = False, without: tuple[str, ...] = ()
) -> tuple[Any, Family]:
    """The pipeline of a local folder, its components in `dtype`, and its family. Nothing is downloaded, no pickle opened.

    `decoders_only` leaves out everything that sampling needs and decoding does not; `without` names more to leave out.

    Raises UsageError with the cause when a component cannot be loaded.
    """
    family, index = described(directory)
    name = index["_class_name"]
    cls = class_of(name)
    import diffusers

    # the argument was called torch_dtype before diffusers 0.42
    kind = {"dtype" if _version(diffusers.__version__) >= (0, 42) else "torch_dtype": dtype}
    left = [one for one in components(index) if (decoders_only and one not in DECODERS) or one in without]
    try:
        if issubclass(cls, diffusers.ModularPipeline):
            pipeline = cls.from_pretrained(str(directory), local_files_only=True)
            names = [one for one in components(index) if one not in left]
            # an index may name the hub, or the place where the folder was before
            here = {"pretrained_model_name_or_path": str(directory), "subfolder": {one: one for one in names}}
            pipeline.load_components(names=names, local_files_only=True, use_safetensors=True, **here, **kind)
        else:
            pipeline = cls.from_pretrained(
                str(directory), local_files_only=True, use_safetensors=True, **kind, **dict.fromkeys(left)
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"{directory}: {name} cannot be opened: {_first(error)}") from error
    for part in components(index):
        if part not in left and getattr(pipeline, part, None) is None:
            raise UsageError(f"{directory}: this pipeline's {part} was not loaded, which generate needs")
    return pipeline, family


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars and no warnings of the libraries while it is open: what is worth saying is said by the verb."""
    import diffusers.utils.logging as one
    import transformers.utils.logging as other

    levels = one.get_verbosity(), other.get_verbosity()
    bars = one.is_progress_bar_enabled(), other.is_progress_bar_enabled()
    with warnings.catch_warnings():
        # ultrazoo itself says what it has to say by other means
        warnings.simplefilter("ignore")
        for library in (one, other):
            # a modular pipeline logs every exception as an error, with tracebacks, before it lets it pass
            library.set_verbosity(library.CRITICAL)
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, level, bar in zip((one, other), levels, bars, strict=True):
                library.set_verbosity(level)
                if bar:
                    library.enable_progress_bar()


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
