"""Spatial reduction: keys and values from a smaller map, reduced before projection (PVTv2, Wang et al., arXiv 2106.13797,
section 3.2; Twins' global sub-sampled attention, Chu et al., arXiv 2104.13840, equation 3).

``y = W_o softmax(W_q x (W_k z)^T / sqrt(D)) W_v z`` with, by `mode`, ``conv``: z = LayerNorm(dense R x R convolution of x,
stride R), R = 8, 4, 2, 1 in the four stages of both models, where 1 is full attention; ``pool`` (PVTv2's linear
attention): z = GELU(LayerNorm(1 x 1 convolution of x averaged to 7 x 7)), as many keys at every size. `kv_compress` makes
keys smaller after projection. Twins is this on odd layers and windows of 7 x 7 on even ones: a recipe of two layer keys.

Where we depart: a partial cell at the border repeats the edge token, where the released convolutions drop it. Frames of a
video are reduced one by one. Hosts with a rotary embedding (PVT and Twins have none) rotate keys at their cell's centre or
index. Invalid tokens are zeros to the convolution and take no part in averages. Convolutions start as the released ones
do, normal with variance 2 / fan-out, so nothing of full attention is there at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid, per_axis
from ..ops import pool
from ..ops.init import Constant, Normal, marked
from ..spec import AttentionSpec, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Host, Positions, grid_positions, refuse_segments
from .fewer_keys import attend_fewer, cell_positions, fewer_cost, mean_of_real
from .full import kernel_problems
from .grouped import attend_extra

NORM_EPS = 1e-5
FACTOR, SIZE = 2, 7


@dataclass(frozen=True, kw_only=True)
class SpatialReductionSpec(AttentionSpec):
    """Full-resolution queries on keys and values projected from a reduced map."""

    name: ClassVar[str] = "spatial_reduction"
    source: ClassVar[str] = "PVTv2, arXiv 2106.13797; Twins, arXiv 2104.13840"
    formula: ClassVar[str] = "y = W_o softmax(W_q x (W_k z)^T / sqrt(D)) W_v z, z = LayerNorm(conv RxR, stride R, of x)"

    mode: Literal["conv", "pool"] = option("conv", "a strided convolution, or averages at a fixed number of places")
    factor: int | tuple[int, ...] = option(
        FACTOR, "conv: R, tokens per cell along H and W, or (T, H, W); 1 reduces nothing", ge=1
    )
    size: int | tuple[int, int] = option(SIZE, "pool: averages per frame along H and W", ge=1)
    cell: Literal["centre", "index"] = option("centre", "a reduced key is rotated at its cell's centre or at its index")
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def cells(self) -> tuple[int, int, int]:
        """``conv``: tokens of a cell along (T, H, W)."""
        return per_axis(self.factor)

    @property
    def places(self) -> tuple[int, int]:
        """``pool``: averages along (H, W)."""
        return per_axis(self.size)[1:]

    @property
    def reduces(self) -> bool:
        return self.mode == "pool" or math.prod(self.cells) > 1

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        if isinstance(self.factor, tuple) and len(self.factor) not in (2, 3):
            rule = f"got {len(self.factor)} numbers; two mean (H, W), three (T, H, W)"
            found.append(Problem("factor", rule, "give one, two or three numbers"))
        if self.mode == "pool" and self.factor != FACTOR:
            found.append(Problem("factor", "mode pool has no factor", "give size, or use mode: conv"))
        if self.mode == "conv" and self.size != SIZE:
            found.append(Problem("size", "mode conv has no size", "give factor, or use mode: pool"))
        if site.rope is None and self.cell != "centre":
            rule = "this backbone has no rotary embedding, coordinates would be ignored"
            found.append(Problem("cell", rule, "leave cell out"))
        return found

    def reduced(self, grid: Grid) -> Grid:
        """The grid of keys."""
        if self.mode == "pool":
            return Grid(grid.t, *self.places)
        return Grid(*(pool.coarse_size(length, factor) for length, factor in zip(grid, self.cells, strict=True)))

    def cost(self, site: Site) -> Cost:
        keys, dim = self.reduced(site.grid).tokens, site.dim
        if not self.reduces:
            return fewer_cost(site, keys, name="reduced", qkv=3)
        taps = 1 if self.mode == "pool" else math.prod(self.cells)
        return fewer_cost(
            site,
            keys,
            name="reduced",
            # extra queries see keys at full resolution
            qkv=3 if site.extra else 1,
            projections=2 * 2 * keys * dim * site.width,
            other=2 * keys * dim * dim * taps,
            parameters=dim * dim * taps + 3 * dim,
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(tokens.any(axis=1, keepdims=True), tokens.shape)

    def traits(self) -> Traits:
        exact = not self.reduces
        smallest = self.cells if self.mode == "conv" else (1, 2, 2)
        t, h, w = (2 * least if least > 1 else 1 for least in smallest)
        return Traits(
            start=Start("exact", "nothing is reduced")
            if exact
            else Start("needs tuning", "PVTv2 and Twins are trained with their reduction from the start"),
            exact_at_init=exact,
            min_grid=(t, h, w),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        image = Site(dim=20, heads=2, head_dim=8, grid=Grid(1, 4, 5), has_timestep=False)
        return [
            (cls(), site),
            (cls(mode="pool", size=(2, 3), cell="index"), site.at(extra=(Segment("text", 4),))),
            (cls(factor=(2, 3, 2), cell="index"), site),
            (cls(mode="pool"), image),
        ]


class SpatialReductionAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: SpatialReductionSpec, site: Site):
        super().__init__(spec, site)
        self.sr: nn.Module | None = None
        self.norm: nn.Module | None = None
        if spec.reduces:
            cell = (1, 1, 1) if spec.mode == "pool" else spec.cells
            kernel = cell if cell[0] > 1 else cell[1:]
            conv: Any = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
            # variance 2 / fan-out, as the released models start
            std = math.sqrt(2 / (math.prod(kernel) * site.dim))
            self.sr = marked(conv(site.dim, site.dim, kernel, stride=kernel), weight=Normal(std), bias=Constant(0.0))
            self.norm = nn.LayerNorm(site.dim, eps=NORM_EPS)

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        grid, valid = call.grid, call.key_valid
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        if valid is not None:
            # what stands in an invalid token must not leak through cells
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
            valid = valid.unflatten(1, grid)
        wants_all = call.extra is not None or not spec.reduces
        raw: Any = host.project(x, "qkv") if wants_all else (host.project(x, "q"), None, None)
        q, k_all, v_all = host.heads(*raw, grid_positions(grid, x.device))
        assert q is not None
        if spec.reduces:
            k, v, real = self._reduced_keys(x.unflatten(1, grid), valid, host)
        else:
            assert k_all is not None and v_all is not None
            k, v, real = k_all.unflatten(1, grid), v_all.unflatten(1, grid), valid
        y = attend_fewer(
            q.unflatten(1, grid), k, v, extra=call.extra, key_valid=real, kernel=spec.kernel, traced=self.traced
        )
        out = host.out(y)
        if call.extra is None:
            return out
        assert k_all is not None and v_all is not None
        return out, attend_extra(call.extra, k_all, v_all, call.key_valid, spec.kernel)

    def _reduced_keys(self, x: Tensor, valid: Tensor | None, host: Host) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, T, H, W, C) → keys and values (B, t, h, w, heads, D), and which of them hold a real token."""
        spec: Any = self.spec
        conv: Any = self.sr
        assert self.norm is not None
        pooling = spec.mode == "pool"
        rows, real = self._averages(x, valid) if pooling else self._cells(x, valid)  # (B, t, h, w, taps*C)
        z = self.norm(F.linear(rows, conv.weight.flatten(2).transpose(1, 2).flatten(1), conv.bias))
        z = F.gelu(z) if pooling else z
        tokens, size = z.flatten(1, 3), z.shape[1:4]
        raw_k: Any = host.project(tokens, "k")
        raw_v: Any = host.project(tokens, "v")
        _, k, v = host.heads(None, raw_k, raw_v, self._positions(x.shape[1:4], x.device))
        assert k is not None and v is not None
        return k.unflatten(1, size), v.unflatten(1, size), real

    def _cells(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens of each cell side by side: (B, t, h, w, taps*C); a cell with a real token is real."""
        spec: Any = self.spec
        cells = pool.cells(x, spec.cells, traced=self.traced)  # (B, t, ft, h, fh, w, fw, C)
        rows = cells.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
        if valid is None:
            return rows, None
        return rows, pool.cells(valid, spec.cells, traced=self.traced).any(6).any(4).any(2)

    def _averages(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Averages at `size` places per frame, which may overlap: (B, T, h, w, C); one with a real token is real."""
        mean = self._adaptive_mean(x)
        if valid is None:
            return mean, None
        share = self._adaptive_mean(valid[..., None].to(torch.promote_types(x.dtype, torch.float32)))
        return mean_of_real(mean, share), share[..., 0] > 0

    def _adaptive_mean(self, z: Tensor) -> Tensor:
        spec: Any = self.spec
        if self.traced:
            # exporters write the pooling operator for the size that they see; (h, H) @ (…, H, C) holds at any
            down, across = (_averaging(z.shape[2 + i], spec.places[i], z) for i in range(2))
            return (down @ (across @ z).transpose(2, 3)).transpose(2, 3)
        frames = F.adaptive_avg_pool2d(z.flatten(0, 1).permute(0, 3, 1, 2), spec.places)
        return frames.permute(0, 2, 3, 1).unflatten(0, z.shape[:2])

    def _positions(self, grid: Sequence[int], device: torch.device) -> Positions:
        spec: Any = self.spec
        if spec.mode == "conv":
            return cell_positions(grid, spec.cells, spec.cell, device)
        axes = [torch.arange(grid[0], device=device, dtype=torch.float32)]
        for length, count in zip(grid[1:], spec.places, strict=True):
            index = torch.arange(count, device=device)
            first, end = _averaged(length, count, device)
            axes.append(index.float() if spec.cell == "index" else (first + end - 1) / 2)
        return Positions(axes[0], axes[1], axes[2])


def _averaged(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Average i of n is of tokens floor(i L / n) to ceil((i + 1) L / n), without the last: both ends (n,)."""
    index = torch.arange(count, device=device)
    return index * length // count, ((index + 1) * length + count - 1) // count


def _averaging(length: int, count: int, like: Tensor) -> Tensor:
    """The averages of an axis as a matrix (count, length); `length` may be symbolic."""
    first, end = _averaged(length, count, like.device)
    token = torch.arange(length, device=like.device)
    inside = (token >= first[:, None]) & (token < end[:, None])
    return inside.to(like.dtype) / (end - first)[:, None].to(like.dtype)


SpatialReductionSpec.module = SpatialReductionAttention
