"""Read tensors from ``.ckpt``, ``.pt`` and ``.pth`` files without running what is in them.

Such files are pickles, and a pickle may hold code. They are opened with torch's restricted unpickler
(``weights_only=True``), which knows tensors and plain containers; whatever else is in the file is an error. There is no
other way in.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError, listed

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training programs keep the state dict in a larger checkpoint."""


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`; mapped from the file where its format allows, so that reading costs no memory.

    Raises WeightsError for a damaged file, for one that holds anything but tensors and plain data, and for content that
    is not a state dict.
    """
    archive = zipfile.is_zipfile(path)
    if archive and _is_script(path):
        raise WeightsError(f"{path} is a TorchScript archive, which holds code; give a state dict")
    try:
        with warnings.catch_warnings():
            # torch's remarks on old pickle protocols and on its own checks are not for our users
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, error)) from error
    except Exception as error:  # a damaged archive surfaces as almost any exception
        raise WeightsError(f"{path} is damaged, cut short or not a torch file: {_first_line(error)}") from error
    return _state_dict(path, content)


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and not _is_state_dict(content):
        inner = [key for key in WRAPPERS if _is_state_dict(content.get(key))]
        if len(inner) > 1:
            raise WeightsError(f"{path} holds several state dicts, {listed(inner)}; save the one you mean alone")
        if inner:
            content = content[inner[0]]
    if not _is_state_dict(content):
        found = type(content).__name__
        if isinstance(content, Mapping):
            found = f"a mapping with {listed(map(repr, list(content)[:6]))}" if content else "an empty mapping"
        raise WeightsError(f"{path} holds no state dict of tensors: it holds {found}")
    for key, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise WeightsError(
                f"{path}: {key!r} is not a plain tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})"
            )
    return dict(content)


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _refusal(path: Path, error: Exception) -> str:
    """Name the function or class that the file wanted; torch's own advice to switch the protection off is left out."""
    text = str(error)
    match = re.search(r"(?:GLOBAL|global|[Ff]unction|[Cc]lass|type)\s+`?([\w.]*\.[\w.]+)`?", text)
    if "nsupported" in text and match:
        return (
            f"{path} holds more than tensors: it wants {match.group(1)!r} to be imported or called; refused. "
            "Convert it to .safetensors where you trust it"
        )
    return f"{path} is not a safe pickle of tensors, or is damaged: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    advice = text.find("WeightsUnpickler error:")
    if advice >= 0:
        text = text[advice + len("WeightsUnpickler error:") :].strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]
