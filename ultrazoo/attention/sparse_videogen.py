"""Sparse VideoGen, SVG1 (arXiv 2502.01776): each head of each sample attends in a band of frames or in a band of places.

A band ``|i - j| <= w`` of tokens in frame order (a few whole frames) or, after a transpose, in place order (one place through
all frames), with the first frame's keys. Which of the two is decided per call, sample and head: some rows are computed exactly
and with both bands, and the smaller squared error wins. ``w = N (1 - sqrt(1 - density))``. Training-free.

Departures: rows are evenly spaced instead of random, so that a call repeats; the band is one of whole blocks; the profiling bands
are the ones that run (the source profiles a narrower one). As in the source, the sink of the transposed order is the first
tokens of that order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Problem
from ..grid import Grid
from ..kernels import attend
from ..kernels.block_map import BlockMap
from ..ops.blocks import Blocks, even_blocks
from ..ops.graphs import outside_graphs
from ..ops.orders import columns
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Host, grid_positions, refuse_segments
from .full import kernel_problems
from .grouped import attend_extra


@dataclass(frozen=True, kw_only=True)
class SparseVideoGenSpec(AttentionSpec):
    """A band per head, in frame order or in place order."""

    name: ClassVar[str] = "sparse_videogen"
    source: ClassVar[str] = "Sparse VideoGen, arXiv 2502.01776; code 5ce7b01"
    formula: ClassVar[str] = (
        "y_i = W_o sum_{j: |p(i) - p(j)| <= w or j in frame 0} softmax(q_i k_j / sqrt(D)) v_j, p chosen per head"
    )

    density: float = option(
        0.3, "share of pairs in the band; the source: 0.3 for Wan, 0.25 for HunyuanVideo", gt=0, le=1
    )
    rows: int = option(64, "rows computed exactly to choose", ge=1)
    block: int = option(128, "tokens per block", ge=1)
    sink: int = option(1, "first frames that all see", ge=0)
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        blocks = even_blocks(site.tokens, self.block)
        return kernel_problems(self.kernel, ("block_map",), blocks, self.key_blocks(blocks, site.extra_tokens))

    def key_blocks(self, blocks: Blocks, extra: int) -> Blocks:
        """Blocks of the grid's keys, and behind them those of extra ones."""
        return blocks.then(even_blocks(extra, self.block)) if extra else blocks

    def band(self, grid: Grid) -> int:
        """Blocks to either side of a query's."""
        return math.ceil(grid.tokens * (1 - math.sqrt(1 - self.density)) / self.block - 1e-9)

    def sunk(self, grid: Grid) -> int:
        """Blocks that hold a token of the sink."""
        return -(-min(self.sink, grid.t) * grid.h * grid.w // self.block)

    def map(self, grid: Grid, blocks: Blocks, lo: int, hi: int) -> np.ndarray:
        """Bool (hi - lo, blocks) of query blocks lo..hi, the same in both orders."""
        at = np.arange(blocks.count)
        near = np.abs(np.arange(lo, hi)[:, None] - at[None, :]) <= self.band(grid)
        return near | (at < self.sunk(grid))[None, :]

    def pairs(self, grid: Grid) -> int:
        """Pairs per head of the band and the sink: what the map holds, row by row of blocks."""
        blocks = even_blocks(grid.tokens, self.block)
        starts, at, band = np.asarray(blocks.starts), np.arange(blocks.count), self.band(grid)
        first, end = np.maximum(at - band, 0), np.minimum(at + band + 1, blocks.count)
        # the sink's blocks are the first ones; the band may reach into them
        sink = min(self.sunk(grid), blocks.count)
        keys = starts[end] - starts[first] + starts[np.minimum(sink, first)]
        keys += np.maximum(starts[sink] - starts[end], 0)
        return int(blocks.sizes @ keys)

    def cost(self, site: Site) -> Cost:
        tokens, extra = site.tokens, site.extra_tokens
        rows = min(self.rows, tokens)
        pairs = self.pairs(site.grid) + tokens * extra + extra * (tokens + extra)
        attention = 4 * pairs * site.inner
        qkv = 2 * tokens * site.dim * 3 * site.width
        # scores once, and values three times: exact, and in either band
        profile = 2 * rows * (tokens + extra) * site.inner * 4
        return Cost(
            pairs=pairs,
            attention_flops=attention,
            qkv_flops=qkv,
            out_flops=2 * tokens * site.inner * site.dim,
            other_flops=profile,
            # the order is chosen by the data, the number of pairs is not
            pairs_min=pairs,
            pairs_max=pairs,
            peak_elements=8 * tokens * site.width + 4 * rows * (tokens + extra) * site.heads,
            saved_elements=(9 + 2 * site.qk_norm) * tokens * site.width + tokens * site.heads,
            branches=(BranchCost("band", pairs, attention, qkv, profile),),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        """Either band, and everything that may decide between them: all tokens."""
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def traits(self) -> Traits:
        exact = self.density == 1
        start = Start("training-free", "arXiv 2502.01776: first 10-20 % of steps and first 3 % of layers dense")
        return Traits(
            start=Start("exact", "the band holds every pair") if exact else start,
            exact_at_init=exact,
            export=(),
            visible="upper bound",
            min_grid=(1, 1, 1),
            selects=True,
            fullgraph=False,
            notes="the order of tokens is chosen by the data",
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(density=0.3, rows=9, block=8), site.at(extra=(Segment("text", 4),))),
            (cls(density=0.2, rows=200, block=6, sink=0), site.at(grid=Grid(4, 3, 5), rope=None)),
        ]


class SparseVideoGenAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        out = host.out(self._attend(q, k, v, call).flatten(2))
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, k, v, call.key_valid, "auto")

    # the order of tokens is data: a compiler goes around it
    @outside_graphs
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Grid rows (B, N, heads, D)."""
        spec: Any = self.spec
        grid = Grid(*call.grid)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, heads, N, D)
        blocks = even_blocks(grid.tokens, spec.block)
        valid = _real(q, call)
        more_k, more_v = _extra(q, call)
        keys, values = _behind(k, more_k), _behind(v, more_v)
        order = torch.as_tensor(np.arange(grid.tokens) if (found := columns(grid, 1)[0]) is None else found).to(
            q.device
        )
        with torch.no_grad():
            by_place = self._choose(q, keys, values, valid, grid, blocks, order)  # (B, heads)
        index = torch.where(by_place[..., None], order, torch.arange(grid.tokens, device=q.device))
        index = index.unsqueeze(-1).expand_as(q)
        q, k, v = (z.gather(2, index) for z in (q, k, v))
        keys, values = _behind(k, more_k), _behind(v, more_v)
        mask = None
        if valid is not None:
            ends = valid[:, None, grid.tokens :].expand(-1, q.shape[1], -1)
            mask = torch.cat(
                [valid[:, None, : grid.tokens].expand(-1, q.shape[1], -1).gather(2, index[..., 0]), ends], 2
            )
        y = self._banded(q, keys, values, mask, grid, blocks)
        return torch.empty_like(y).scatter(2, index, y).transpose(1, 2)

    def _banded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: Grid, blocks: Blocks) -> Tensor:
        """Attention in the band: extra keys stand behind the grid's and are seen by all; mask (B, heads, keys)."""
        spec: Any = self.spec
        extra = k.shape[2] - grid.tokens
        key_blocks = spec.key_blocks(blocks, extra)

        def rows(lo: int, hi: int) -> Tensor:
            found = torch.from_numpy(spec.map(grid, blocks, lo, hi))[None, None].to(q.device)
            return torch.cat([found, found.new_ones(1, 1, hi - lo, key_blocks.count - blocks.count)], dim=-1)

        batch, heads = q.shape[:2]
        block_map = BlockMap(blocks, key_blocks, rows, batch, heads, q.device)
        weight = None
        if mask is not None:
            # heads stand in different orders, so that their masks differ: as weights, which may
            weight = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, float("-inf"))[:, :, None]
        found = attend(q, k, v, log_weight=weight, block_map=block_map, kernel=spec.kernel)
        assert isinstance(found, Tensor)
        return found

    def _choose(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, grid: Grid, blocks: Blocks, order: Tensor
    ) -> Tensor:
        """Bool (B, heads): does the band in place order miss less than the one in frame order?"""
        spec: Any = self.spec
        count = min(spec.rows, grid.tokens)
        rows = ((torch.arange(count, device=q.device, dtype=torch.float64) + 0.5) * grid.tokens / count).long()
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q[:, :, rows].to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-1, -2)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
        wanted = logits.softmax(-1) @ v.to(wide)
        place = torch.empty_like(order)
        place[order] = torch.arange(grid.tokens, device=q.device)
        missed = []
        for at in (torch.arange(grid.tokens, device=q.device), place):
            block = at // min(spec.block, grid.tokens)
            seen = (block[rows, None] - block[None, :]).abs() <= spec.band(grid)
            seen |= (block < spec.sunk(grid))[None, :]
            seen = torch.cat([seen, seen.new_ones(count, k.shape[2] - grid.tokens)], dim=1)
            banded = logits.masked_fill(~seen, float("-inf"))
            # a row whose band holds no valid key gives zeros
            found = banded.softmax(-1).nan_to_num(0.0) @ v.to(wide)
            error = (found - wanted).square().sum(-1)
            # rows of tokens that are not real decide nothing
            missed.append((error if valid is None else error * valid[:, None, rows]).sum(-1))
        return missed[1] < missed[0]


SparseVideoGenSpec.module = SparseVideoGenAttention


def _extra(q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """k and v (B, heads, M, D) of extra tokens; M = 0 without any."""
    if call.extra is None:
        empty = q[:, :, :0]
        return empty, empty
    return call.extra.k.transpose(1, 2), call.extra.v.transpose(1, 2)


def _behind(z: Tensor, more: Tensor) -> Tensor:
    """(B, heads, N + M, D); as it is where M = 0."""
    return torch.cat([z, more], dim=2) if more.shape[2] else z


def _real(q: Tensor, call: Call) -> Tensor | None:
    """Bool (B, N + M): which keys count; None where all do."""
    mask = None if call.extra is None else call.extra.key_mask
    if call.key_valid is None and mask is None:
        return None
    batch, tokens = q.shape[0], q.shape[2]
    grid = torch.ones(batch, tokens, dtype=torch.bool, device=q.device) if call.key_valid is None else call.key_valid
    if call.extra is None:
        return grid
    more = torch.ones(batch, call.extra.k.shape[1], dtype=torch.bool, device=q.device) if mask is None else mask
    return torch.cat([grid, more], dim=1)
