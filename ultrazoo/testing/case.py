"""What an oracle is given: the weights, the inputs and the options of one call, all in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..spec import AttentionSpec, Site
from .reference import ReferenceHost


@dataclass(frozen=True)
class ExtraTokens:
    """Tokens without a place on the grid, normed, rotated and split: q, k, v (B, M, heads, D); `key_mask` (B, M)."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """One call of one attention.

    `x` (B, N, C) and all weights are fp64. `weights` are the attention's own parameters by name, `host` the backbone's
    side. `timestep` is (B,), (B, T), (B, N) or None; `key_valid` (B, N) or None.
    """

    spec: AttentionSpec
    site: Site
    x: Tensor
    grid: tuple[int, int, int]
    host: ReferenceHost
    weights: Mapping[str, Tensor]
    timestep: Tensor | None = None
    extra: ExtraTokens | None = None
    key_valid: Tensor | None = None

    def own(self, prefix: str) -> dict[str, Tensor]:
        """The attention's own parameters below `prefix`, with it cut off."""
        return {k[len(prefix) :]: v for k, v in self.weights.items() if k.startswith(prefix)}


Oracle = Callable[[Case], Any]
"""Case → (B, N, C), or (y, y_extra) iff the case has extra tokens; y_extra (B, M, heads*D) is before any projection."""


def plain(value: Any) -> Any:
    """A spec as plain data: mappings, lists and scalars, every option present, ``name`` first where there is one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {"name": value.name} if getattr(value, "name", "") else {}
        return named | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
