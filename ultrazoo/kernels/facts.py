"""What every kernel states of itself, and why one cannot be used on this machine: the rows of ``ultrazoo list kernels``."""

from __future__ import annotations

from dataclasses import dataclass

from .. import registry
from .door import KernelSpec


@dataclass(frozen=True)
class KernelRow:
    """One line of ``ultrazoo list kernels``; `reason` is empty where the kernel can be used."""

    name: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, int]
    takes: tuple[str, ...]
    backward: bool
    exact: bool
    exportable: bool
    reason: str


def table() -> list[KernelRow]:
    """Every kernel with its facts and, where it cannot be used on this machine, why. Built-ins come first."""
    rows = []
    for entry in registry.entries("kernel"):
        if not entry.builtin and entry.status != "local":
            rows.append(
                KernelRow(
                    entry.name, entry.summary, (), (), (0, 0), (), False, False, False, entry.problem or entry.status
                )
            )
            continue
        spec: type[KernelSpec] = registry.find("kernel", entry.name)
        rows.append(
            KernelRow(
                name=entry.name,
                summary=entry.summary,
                devices=spec.devices,
                dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in spec.dtypes),
                head_dims=spec.head_dims,
                takes=tuple(sorted(spec.takes)),
                backward=spec.backward,
                exact=spec.exact,
                exportable=spec.exportable,
                reason=spec.absent(),
            )
        )
    return rows
