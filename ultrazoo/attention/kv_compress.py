"""Key and value compression after projection, as in PixArt-Sigma (Chen et al., arXiv 2403.04692, section 3.3).

Queries stay at full resolution. K (normed, not yet rotated) and V come out of the host's projections and are each made
smaller over (H, W): ``y = W_o softmax(Q f(K)^T / sqrt(D)) f(V)``. The published f, ``conv``, is a depthwise R x R
convolution with stride R that starts as the mean, then a LayerNorm over all channels; K and V share both. Every design
that compresses x instead, before the projections, is `branched` (``compress: {of: keys}``) or `spatial_reduction`.

Where we depart: a partial cell at the border repeats the edge token, where the released code drops it; ``average`` is the
mean of each cell, where the released mode ``ave`` interpolates to the nearest neighbour, that is, takes one token as
``uniform`` does; ``uniform_every`` keeps the last, incomplete stretch. Hosts with a rotary embedding (PixArt has none):
compressed keys are rotated at their cell's centre, kept ones where they stood; `cell` chooses. Invalid tokens are zeros
to the convolution and take no part in the average. As one head group's attention the norm spans that group's channels.

Not exact at the start: the LayerNorm rescales K and V, so that even the fresh convolution is not pooled attention.
``factor: 1`` is full attention, without parameters, in every mode, as in the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid, per_axis
from ..ops import pool
from ..ops.init import Constant, marked
from ..spec import AttentionSpec, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Host, grid_positions, refuse_segments
from .fewer_keys import attend_fewer, cell_positions, fewer_cost, mean_of_real
from .full import kernel_problems
from .grouped import attend_extra

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class KvCompressSpec(AttentionSpec):
    """Full-resolution queries on keys and values that are compressed after projection."""

    name: ClassVar[str] = "kv_compress"
    source: ClassVar[str] = "PixArt-Sigma, arXiv 2403.04692, section 3.3"
    formula: ClassVar[str] = "y = W_o softmax(Q f(K)^T / sqrt(D)) f(V), f = LayerNorm(depthwise conv RxR, stride R)"

    mode: Literal["conv", "uniform", "average", "uniform_every"] = option(
        "conv", "learned mean and norm, first token of a cell, mean of a cell, or every R-th token in raster order"
    )
    factor: int | tuple[int, ...] = option(
        2, "R: tokens per cell along H and W, or (T, H, W); 1 compresses nothing", ge=1
    )
    cell: Literal["centre", "index"] | None = option(
        None, "where a compressed key is rotated; null: its cell's centre, or where a kept token stood"
    )
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def size(self) -> tuple[int, int, int]:
        """Tokens of a cell along (T, H, W)."""
        return per_axis(self.factor)

    @property
    def compresses(self) -> bool:
        return math.prod(self.size) > 1

    @property
    def learns(self) -> bool:
        return self.mode == "conv" and self.compresses

    @property
    def where(self) -> str:
        """Which place of a cell its key is rotated at."""
        return self.cell or ("first" if self.mode == "uniform" else "centre")

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel)
        if isinstance(self.factor, tuple) and len(self.factor) not in (2, 3):
            found.append(Problem("factor", f"got {len(self.factor)} numbers; one or two mean (H, W), three (T, H, W)"))
        if isinstance(self.factor, tuple) and self.mode == "uniform_every":
            found.append(Problem("factor", "uniform_every steps through all tokens in raster order", "give one number"))
        if self.cell is not None and self.mode == "uniform_every":
            rule = "uniform_every has no cells: tokens are rotated where they stand"
            found.append(Problem("cell", rule, "leave cell out"))
        elif self.cell is not None and site.rope is None:
            rule = "this backbone has no rotary embedding, coordinates would be ignored"
            found.append(Problem("cell", rule, "leave cell out"))
        return found

    def keys(self, grid: Grid) -> int:
        """How many compressed keys a grid has."""
        if self.mode == "uniform_every":
            return pool.coarse_size(grid.tokens, self.size[1])
        return math.prod(pool.coarse_size(length, factor) for length, factor in zip(grid, self.size, strict=True))

    def cost(self, site: Site) -> Cost:
        keys, taps = self.keys(site.grid), math.prod(self.size)
        parameters = site.inner * (taps + 1) + 2 * site.inner if self.learns else 0
        other = 2 * 2 * keys * site.inner * taps if self.learns else 0
        return fewer_cost(site, keys, name="compressed", qkv=3, other=other, parameters=parameters)

    def _kept(self, grid: Grid) -> np.ndarray:
        """Which tokens matter as keys: bool (N,)."""
        if self.mode == "uniform_every":
            return np.arange(grid.tokens) % self.size[1] == 0
        if self.mode != "uniform":
            return np.ones(grid.tokens, dtype=bool)
        t, h, w = (np.arange(length) % factor == 0 for length, factor in zip(grid, self.size, strict=True))
        kept: np.ndarray = (t[:, None, None] & h[:, None] & w).reshape(-1)
        return kept

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        wanted = np.arange(site.tokens) if queries is None else np.asarray(queries, dtype=int)
        seen = np.repeat(self._kept(site.grid)[None], len(wanted), axis=0)
        # a token is its own query
        seen[np.arange(len(wanted)), wanted] = True
        return seen[None]

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return tokens | (self._kept(site.grid) & tokens.any(axis=1, keepdims=True))

    def traits(self) -> Traits:
        exact = not self.compresses
        t, h, w = (2 * factor if factor > 1 else 1 for factor in self.size)
        return Traits(
            start=Start("exact", "nothing is compressed")
            if exact
            else Start("needs tuning", "PixArt-Sigma: fine-tuned from the model without compression"),
            exact_at_init=exact,
            min_grid=(t, h, w),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True)
        image = Site(dim=20, heads=2, head_dim=8, grid=Grid(1, 4, 5), has_timestep=False)
        return [
            (cls(), image.at(qk_norm=True)),
            (cls(cell="index", factor=(3, 2)), site.at(extra=(Segment("text", 4),))),
            (cls(mode="average"), site),
            (cls(mode="uniform", factor=(2, 2, 3)), site),
            (cls(mode="uniform_every", factor=3), site),
        ]


class KvCompressAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: KvCompressSpec, site: Site):
        super().__init__(spec, site)
        self.sr: nn.Module | None = None
        self.norm: nn.Module | None = None
        if spec.learns:
            kernel = spec.size if spec.size[0] > 1 else spec.size[1:]
            conv: Any = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
            self.sr = marked(
                conv(site.inner, site.inner, kernel, stride=kernel, groups=site.inner),
                weight=Constant(1 / math.prod(kernel)),
                bias=Constant(0.0),
            )
            self.norm = nn.LayerNorm(site.inner, eps=NORM_EPS)

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        grid, valid = call.grid, call.key_valid
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        if valid is not None:
            # what stands in an invalid token must not leak through cells
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        places = grid_positions(grid, x.device)
        raw_q, raw_k, raw_v = host.project(x, "qkv")
        q, _, _ = host.heads(raw_q, None, None, places)
        del raw_q
        # (B, N, heads, D), normed; not rotated before it is known where the compressed keys are
        _, k, v = host.heads(None, raw_k, raw_v, None)
        del raw_k, raw_v
        assert q is not None and k is not None and v is not None
        if spec.mode == "uniform_every":
            step = spec.size[1]
            k_small, v_small = (z[:, None, None, ::step] for z in (host.rotate(k, places), v))
            small = None if valid is None else valid[:, None, None, ::step]
        else:
            # (B, t, h, w, heads, D)
            at = cell_positions(grid, spec.size, spec.where, x.device)
            k_small, v_small = (self._compressed(z, grid, valid) for z in (k, v))
            k_small = host.rotate(k_small.flatten(1, 3), at).view_as(k_small)
            small = None if valid is None else self._real(valid.unflatten(1, grid))
        y = attend_fewer(
            q.unflatten(1, grid),
            k_small,
            v_small,
            extra=call.extra,
            key_valid=small,
            kernel=spec.kernel,
            traced=self.traced,
        )
        out = host.out(y)
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, host.rotate(k, places), v, valid, spec.kernel)

    def _compressed(self, z: Tensor, grid: tuple[int, int, int], valid: Tensor | None) -> Tensor:
        """(B, N, heads, D) → (B, t, h, w, heads, D)."""
        spec: Any = self.spec
        if valid is not None:
            z = z.masked_fill(~valid[..., None, None], 0.0)
        cells = z.flatten(2).unflatten(1, grid)  # (B, T, H, W, heads*D)
        if self.sr is not None and self.norm is not None:
            own: Any = self.sr
            cells = self.norm(pool.conv_cells(cells, own.weight, own.bias, spec.size, traced=self.traced))
        elif spec.mode == "uniform":
            cells = pool.first_of_cells(cells, spec.size, traced=self.traced)
        elif spec.compresses and spec.mode == "average":
            cells = pool.mean_cells(cells, spec.size, traced=self.traced)
            if valid is not None:
                real = valid.unflatten(1, grid)[..., None].to(torch.promote_types(z.dtype, torch.float32))
                cells = mean_of_real(cells, pool.mean_cells(real, spec.size, traced=self.traced))
        return cells.unflatten(-1, (-1, self.site.head_dim))

    def _real(self, valid: Tensor) -> Tensor:
        """Which compressed keys hold a real token: (B, T, H, W) → (B, t, h, w)."""
        spec: Any = self.spec
        cells = pool.cells(valid, spec.size, traced=self.traced)
        return cells[:, :, 0, :, 0, :, 0] if spec.mode == "uniform" else cells.any(6).any(4).any(2)


KvCompressSpec.module = KvCompressAttention
