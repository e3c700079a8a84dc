"""The export targets: what each writes, and how its file is loaded and run. One file each.

A target is a module with ``SUFFIX``, ``SUMMARY``, ``absent()``, ``write(job, folder)`` and ``Loaded(path)``, and ``operators(path)``
where the file has others than the program. `Loaded` has ``run(inputs)``, ``replace(values)`` and ``facts()``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UsageError, near
from ..ports import EXPORTS, Port
from .sizes import Bounds, Sizes

STEM = "model"


@dataclass
class Job:
    """What a target writes a file of. `program` is there for all targets but the traced one."""

    model: nn.Module
    ports: Sequence[Port]
    bounds: Bounds
    traced_at: Sizes
    dtype: torch.dtype
    metadata: Mapping[str, str]
    opset: int | None = None
    program: Any = None


class Loaded(Protocol):
    """An exported file in its runtime."""

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One forward; inputs by their names."""
        ...

    def not_zero(self, names: Iterable[str]) -> list[str]:
        """Those of the model's weights `names` that the file lacks or that are not all zero in it."""
        ...

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Put other values in the place of weights, by the model's names for them."""
        ...

    def facts(self) -> dict[str, Any]:
        """Runtime, versions and, after a run, the attention kernels that ran."""
        ...


def target(name: str) -> Any:
    """The module of a target. Raises UsageError for a name that is none."""
    if name not in EXPORTS:
        hint = near(name, EXPORTS)
        raise UsageError(f"--to is one of {', '.join(EXPORTS)}, got {name!r}" + (f"; {hint}" if hint else ""))
    return importlib.import_module(f"ultrazoo.export.to_{name}")


def target_of(path: Path) -> str:
    """The target that a file's name says. Raises UsageError."""
    for name in EXPORTS:
        if path.name.removesuffix(".unverified").endswith(target(name).SUFFIX):
            return name
    known = ", ".join(f"*{target(name).SUFFIX}" for name in EXPORTS)
    raise UsageError(f"{path} is no exported model: its name ends in none of {known}")
