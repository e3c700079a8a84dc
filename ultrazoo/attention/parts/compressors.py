"""Compressors: many tokens to one before attention, and the lift back where queries were compressed.

Cells are (fh, fw) tokens of one frame, or (ft, fh, fw). At sizes that do not divide, ``ragged: exact`` fills the last
cell by repeating edge tokens and the lift goes to the full multiple and is cropped; ``ragged: resize`` drops the
remainder and lifts straight to the size wanted (the released UltraGen).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import Problem
from ...ops import pool
from ...ops.init import Centre, Constant
from ...spec import Site, option
from .base import CompressSpec, Lift

CONV3D_TAPS = 27


@dataclass(frozen=True, kw_only=True)
class _CellSpec(CompressSpec):
    """Options shared by the built-in compressors."""

    factor: int | tuple[int, ...] = option(2, "tokens per cell along H and W, or (T, H, W)", ge=1)
    of: Literal["both", "keys"] = option("both", "compress queries and keys, or keys and values only")
    lift: Literal["nearest", "bilinear", "bilinear_conv3d"] | None = option(
        None, "how compressed queries come back; null: the compressor's own default"
    )
    ragged: Literal["exact", "resize"] = option("exact", "a partial cell repeats the edge, or is dropped")

    def problems(self, site: Site) -> list[Problem]:
        if isinstance(self.factor, tuple) and len(self.factor) not in (2, 3):
            return [Problem("factor", f"got {len(self.factor)} numbers; one or two mean (H, W), three (T, H, W)")]
        return super().problems(site)


@dataclass(frozen=True, kw_only=True)
class AvgPoolSpec(_CellSpec):
    """The mean of each cell. No parameters."""

    name: ClassVar[str] = "avg_pool"

    def compressor(self, site: Site) -> nn.Module:
        return _AvgPool(self)


@dataclass(frozen=True, kw_only=True)
class StrideSpec(_CellSpec):
    """The first token of each cell. No parameters."""

    name: ClassVar[str] = "stride"
    reads: ClassVar[Literal["all", "first"]] = "first"
    source: ClassVar[str] = "PixArt-Sigma, arXiv 2403.04692 (uniform sampling)"

    def compressor(self, site: Site) -> nn.Module:
        return _Stride(self)


@dataclass(frozen=True, kw_only=True)
class DepthwiseConvSpec(_CellSpec):
    """A depthwise convolution with kernel = stride = cell; starts as the mean."""

    name: ClassVar[str] = "depthwise_conv"
    source: ClassVar[str] = "UltraGen, arXiv 2510.18775, section 4.2"
    default_lift: ClassVar[Lift] = "bilinear_conv3d"

    def parameters(self, site: Site) -> int:
        return site.dim * (math.prod(self.cell) + 1)

    def flops(self, site: Site) -> int:
        return 2 * self.coarse(site.grid).tokens * site.dim * math.prod(self.cell)

    def compressor(self, site: Site) -> nn.Module:
        return _DepthwiseConv(self, site)


class _Cells(nn.Module):
    """Base of the built-in compressors: keeps the cell and what to do with a partial one."""

    def __init__(self, spec: CompressSpec):
        super().__init__()
        self.cell = spec.cell
        self.ragged = spec.ragged

    def extra_repr(self) -> str:
        return f"cell={self.cell}, ragged={self.ragged}"


class _AvgPool(_Cells):
    def forward(self, x: Tensor, traced: bool = False) -> Tensor:
        return pool.mean_cells(x, self.cell, self.ragged, traced)


class _Stride(_Cells):
    def forward(self, x: Tensor, traced: bool = False) -> Tensor:
        return pool.first_of_cells(x, self.cell, self.ragged, traced)


class _ConvWeights(nn.Module):
    """Weight and bias of a depthwise convolution, under the name that checkpoints use."""

    def __init__(self, channels: int, kernel: Sequence[int], start: Centre | Constant):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, *kernel))
        self.bias = nn.Parameter(torch.empty(channels))
        self.start = start

    def initial_values(self) -> dict[str, Any]:
        return {"weight": self.start, "bias": Constant(0.0)}


class _DepthwiseConv(_Cells):
    def __init__(self, spec: CompressSpec, site: Site):
        super().__init__(spec)
        kernel = self.cell if self.cell[0] > 1 else self.cell[1:]
        self.conv = _ConvWeights(site.dim, kernel, Constant(1 / math.prod(self.cell)))

    def forward(self, x: Tensor, traced: bool = False) -> Tensor:
        return pool.conv_cells(x, self.conv.weight, self.conv.bias, self.cell, self.ragged, traced)


class LiftModule(nn.Module):
    """Compressed outputs back to the grid: ``module(y, size, traced)``, (B, t, h, w, C) → (B, *size, C)."""

    def __init__(self, spec: CompressSpec, site: Site):
        super().__init__()
        self.cell = spec.cell
        self.ragged = spec.ragged
        self.mode = spec.lift_mode
        if self.mode == "bilinear_conv3d":
            self.conv = _ConvWeights(site.inner, (3, 3, 3), Centre())

    def forward(self, y: Tensor, size: Sequence[int], traced: bool = False) -> Tensor:
        if self.mode == "bilinear_conv3d":
            return pool.lift_conv3d(y, self.cell, size, self.conv.weight, self.conv.bias, self.ragged, traced)
        return pool.lift(y, self.cell, size, self.mode, self.ragged, traced)

    def frames(self, y: Tensor, size: Sequence[int]) -> pool.Frames:
        """The same frame by frame, where cells lie in one frame; without gradients."""
        if self.mode == "bilinear_conv3d":
            return pool.lift_conv3d_frames(y, self.cell, size, self.conv.weight, self.conv.bias, self.ragged)
        return pool.lift_frames(y, self.cell, size, self.mode, self.ragged)

    def extra_repr(self) -> str:
        return f"{self.mode}, cell={self.cell}, ragged={self.ragged}"


@dataclass(frozen=True)
class Unlifted:
    """The output of a branch at its cells (B, t, h, w, heads*D), to lift to `size` tokens when it is wanted."""

    lift: LiftModule
    y: Tensor
    size: Sequence[int]

    def whole(self) -> Tensor:
        """(B, *size, heads*D)."""
        found: Tensor = self.lift(self.y, self.size)
        return found

    def frames(self) -> pool.Frames:
        return self.lift.frames(self.y, self.size)


def lift_parameters(spec: CompressSpec, site: Site) -> int:
    """Parameters of the lift that goes with `spec`."""
    if spec.of == "keys" or spec.lift_mode != "bilinear_conv3d":
        return 0
    return site.inner * (CONV3D_TAPS + 1)


def lift_flops(spec: CompressSpec, site: Site) -> int:
    """FLOPs of the lift's convolution at the site's grid."""
    if spec.of == "keys" or spec.lift_mode != "bilinear_conv3d":
        return 0
    return 2 * site.tokens * site.inner * CONV3D_TAPS
