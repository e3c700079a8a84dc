"""An exported file as something to call: sizes are checked against its bounds first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UltrazooError, UsageError
from ..weights.config import require_plugins
from . import proof, record
from .kernels_seen import unwatched
from .sizes import bounds_from, require_within, sizes_of
from .targets import Loaded, target


class Engine:
    """``engine(latents, timestep, text)``, as the model itself is called; the answer is on the device of the first input.

    Making one checks the file and loads nothing: the runtime loads it in `load`, or in the first call, and drops it in
    `release`. `device` is where the runtime computes: inputs are taken there. Raises UsageError for a directory that holds
    no export, a file that was not proved (unless `unverified`), a damaged file, a runtime or a device that is not there,
    and for inputs outside the bounds; RegistryError with the pip line for a plugin of the design that is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], unverified: bool = False):
        folder, self.content = record.opened(path)
        if not unverified:
            _require_proved(folder, self.content)
        self._target = target(self.content["target"])
        if why := self._target.absent():
            raise UsageError(why)
        require_plugins(folder, self.content["plugins"])
        record.require_whole(folder, self.content)
        self.file = folder / self.content["file"]
        if not self.file.exists():
            self.file = folder / (self.content["file"] + record.UNVERIFIED)
        self.ports = record.ports_from(self.content["inputs"])
        self.bounds = bounds_from(self.content["bounds"])
        self.dtype: torch.dtype = getattr(torch, self.content["dtype"])
        self.device = _device(folder, self.content["device"])
        self._loaded: Loaded | None = None
        self._ran = False

    @property
    def loaded(self) -> Loaded:
        """The file in its runtime, loaded now where it was not yet. Raises UsageError where the runtime does not take it."""
        if self._loaded is None:
            try:
                self._loaded = self._target.Loaded(self.file)
            except MemoryError:
                raise
            except Exception as error:
                raise UsageError(
                    f"{self.file} cannot be loaded here: {_first(error)}; it was made with torch {self.content['torch']}: "
                    "use that, or export again"
                ) from error
        return self._loaded

    def load(self) -> None:
        """Load the file now, not in the first call."""
        self.loaded  # noqa: B018

    def release(self) -> None:
        """Give the memory of the file back; the next call loads it again."""
        self._loaded = None
        self._ran = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != len(self.ports):
            due = ", ".join(port.name for port in self.ports)
            raise UsageError(f"{self.file} takes {len(self.ports)} inputs ({due}), got {len(inputs)}")
        named = {}
        for port, value in zip(self.ports, inputs, strict=True):
            kind = {"noise": self.dtype, "timestep": torch.float32, "label": torch.int64}[port.kind]
            # compiled code reads memory as it lay when it was traced
            named[port.name] = value.to(self.device, kind).contiguous()
        sizes = sizes_of(self.ports, named)
        require_within(self.bounds, sizes, str(self.file))
        loaded = self.loaded
        try:
            # the first forward tells which kernels run
            with unwatched() if self._ran else contextlib.nullcontext():
                found = loaded.run(named)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UltrazooError(f"{self.file} failed at {proof.shown(sizes)}: {_first(error)}") from error
        self._ran = True
        return found.to(inputs[0].device)


def _require_proved(folder: Path, content: Mapping[str, Any]) -> None:
    holds = content["proof"].get("holds")
    if holds is None:
        raise UsageError(f"{folder} was exported with --no-verify, so nothing is known of it; export it again without")
    if not holds:
        raise UsageError(
            f"{folder} holds a file that was not proved equal to its model; `ultrazoo export --verify {folder}` proves it "
            "again and says what is wrong"
        )


def _device(folder: Path, name: str) -> torch.device:
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        here = f"torch finds {count} CUDA devices here" if count else "torch finds no CUDA device here"
        raise UsageError(f"{folder} was exported for {name} and {here}; export it again with --device cpu")
    return device


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
