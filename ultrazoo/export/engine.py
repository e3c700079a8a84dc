"""An exported file as something to call: sizes are checked against its bounds first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import record
from .sizes import bounds_from, require_within, sizes_of
from .targets import target, target_of


class Engine:
    """``engine(latents, timestep, text)``, as the model itself is called; tensors in and out are torch's, on the CPU or on
    the device that the file was compiled for.

    Raises UsageError for a directory that holds no export, a file that was not proved (unless `unverified`), a damaged file, a
    runtime that is not installed, and for inputs outside the bounds.
    """

    def __init__(self, path: str | os.PathLike[str], unverified: bool = False):
        place = Path(path)
        if not place.exists():
            raise UsageError(
                f"{place}: no such file; give the directory that `ultrazoo export` wrote, or the file in it"
            )
        folder = place if place.is_dir() else place.parent
        if not place.is_dir():
            target_of(place)
        self.content: Mapping[str, Any] = record.read(folder)
        if not self.content["proof"]["holds"] and not unverified:
            raise UsageError(
                f"{folder} holds a file that was not proved equal to its model; `ultrazoo export --verify {folder}` says why"
            )
        module = target(self.content["target"])
        if why := module.absent():
            raise UsageError(why)
        record.require_whole(folder, self.content)
        self.file = folder / self.content["file"]
        self.ports = record.ports_from(self.content["inputs"])
        self.bounds = bounds_from(self.content["bounds"])
        self.dtype: torch.dtype = getattr(torch, self.content["dtype"])
        self.loaded = module.Loaded(self.file)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != len(self.ports):
            due = ", ".join(port.name for port in self.ports)
            raise UsageError(f"{self.file} takes {len(self.ports)} inputs ({due}), got {len(inputs)}")
        named = {}
        for port, value in zip(self.ports, inputs, strict=True):
            kind = {"noise": self.dtype, "timestep": torch.float32, "label": torch.int64}[port.kind]
            named[port.name] = value.to(kind)
        require_within(self.bounds, sizes_of(self.ports, named), str(self.file))
        return self.loaded.run(named)  # type: ignore[no-any-return]
