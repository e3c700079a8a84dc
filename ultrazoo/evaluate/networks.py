"""Feature networks from a local directory: ``lpips.*``, ``fvd.*``, ``frames.*``. Nothing is ever downloaded.

``lpips`` is a state dict (safetensors, or a torch file opened with ``weights_only=True``) or a TorchScript file; the other two
are TorchScript. A TorchScript file is a program: it is run because the user named its directory, and should be trusted.

- lpips: two batches (B, 3, H, W) in [-1, 1] → one distance per item.
- fvd: clips (B, 3, T, S, S) in [-1, 1] → (B, F). Arguments ``rescale, resize, return_features`` of the I3D that most FVD
  programs use are given as False, False, True where the file has them.
- frames: (B, 3, H, W) in [-1, 1] → (B, F); it resizes and normalises by itself.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, WeightsError, listed
from ..weights.reader import open_checkpoint
from .lpips import from_tensors

ROLES = ("lpips", "fvd", "frames")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ts", ".torchscript")
I3D = {"rescale": False, "resize": False, "return_features": True}
Network = Callable[..., Tensor]


def find(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """The file of each role that the directory holds. Raises UsageError where there is none, or two of one role."""
    place = Path(directory)
    if not place.is_dir():
        raise UsageError(f"--networks {place}: {'not a directory' if place.exists() else 'no such directory'}")
    found: dict[str, Path] = {}
    for role in ROLES:
        files = [file for suffix in SUFFIXES if (file := place / f"{role}{suffix}").is_file()]
        if len(files) > 1:
            raise UsageError(f"{place} holds {listed(file.name for file in files)}; keep the one that you mean")
        if files:
            found[role] = files[0]
    if not found:
        raise UsageError(
            f"{place} holds no feature network; files are named {listed(ROLES)} and end in {listed(SUFFIXES)}"
        )
    return found


def load(role: str, path: Path, device: str | torch.device = "cpu") -> Network:
    """The network of a role, checked for what it gives. Raises WeightsError for a file that does not serve."""
    if _is_script(path):
        return _checked(role, path, _script(path, device))
    if role != "lpips":
        raise WeightsError(f"{path} holds no program; the network {role!r} must be a TorchScript file")
    with open_checkpoint(path) as checkpoint:
        network = from_tensors({key: checkpoint.tensor(key).clone() for key in checkpoint}, path)
    return _checked(role, path, network.eval().to(device))


def digest(path: Path) -> str:
    """The sha256 of a file: which network a result was made with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _script(path: Path, device: str | torch.device) -> Network:
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript; the published I3D is such a file all the same
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged, or a TorchScript file that this torch cannot read: {_first(error)}"
        ) from error
    arguments = [argument.name for argument in module.forward.schema.arguments]
    options = I3D if set(I3D) <= set(arguments) else {}

    def run(*inputs: Tensor) -> Tensor:
        try:
            return module(*inputs, **options)
        except RuntimeError as error:
            shapes = listed(str(tuple(x.shape)) for x in inputs)
            raise WeightsError(f"{path} cannot take {shapes}: {_first(error)}") from error

    return run


def _checked(role: str, path: Path, network: Network) -> Network:
    """The network without gradients; what it gives must be finite and of the shape that its role says."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Any = network(*inputs)
        batch = len(inputs[0])
        if role == "lpips" and isinstance(found, Tensor) and found.numel() == batch:
            found = found.reshape(batch)
        wanted = 1 if role == "lpips" else 2
        if not isinstance(found, Tensor) or found.ndim != wanted or len(found) != batch:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            form = "one distance per item" if role == "lpips" else "one vector of features per item, (B, F)"
            raise WeightsError(f"{path} gives {got} for a batch of {batch}; {role!r} must give {form}")
        if not bool(torch.isfinite(found).all()):
            raise WeightsError(f"{path} gives values that are not finite")
        return found

    return run


def _first(error: Exception) -> str:
    """The last line of torch's message: the traceback of the program inside the file stands before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].strip()[:200]
