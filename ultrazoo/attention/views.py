"""What designs share in which every token of an axis sees a contiguous range of it: cost, influence and the module.

Such a design is a product over the axes (`ops.boxes.AxisView`), for all heads or per group of heads. It has no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import Problem
from ..grid import Grid
from ..ops.boxes import AxisView, Boxes, fitted, tile_elements, visited
from ..ops.graphs import constant_in_graphs
from ..spec import AttentionSpec, BranchCost, Cost, Site
from .boxed import Job, attend_boxes
from .by_head import pick
from .contract import Attention, Call, Host, grid_positions, refuse_segments
from .full import kernel_problems
from .grouped import attend_extra

Views = tuple[AxisView, AxisView, AxisView]

NO_EXPORT = "boxes are made for one grid, whose sizes are plain ints"
"""Why designs of this kind do not export with open sizes."""


class Group(NamedTuple):
    """Heads that see the same: their name in the cost, the heads (None: all) and the views of the three axes."""

    name: str
    heads: tuple[int, ...] | None
    views: Views

    def count(self, site: Site) -> int:
        return site.heads if self.heads is None else len(self.heads)


@dataclass(frozen=True, kw_only=True)
class ViewsSpec(AttentionSpec):
    """Base of designs made of axis views. Subclasses give `groups`; `score_scale` where it is not ``D**-0.5``."""

    def groups(self, grid: Grid, heads: int) -> tuple[Group, ...]:
        raise TypeError(f"{type(self).__name__} does not say what its tokens see")

    def score_scale(self, head_dim: int) -> float | None:
        return None

    def mask_problems(self, kernel: str, site: Site) -> list[Problem]:
        """A kernel that takes no bias, where tiles at the site's grid need masks. For settings without other problems."""
        if kernel == "auto":
            return []
        axes = (axis for group in self.groups(site.grid, site.heads) for axis in fitted(*group.views).axes)
        masked = any(tile.seen is not None for axis in axes for tile in axis)
        return kernel_problems(kernel, ("bias",) if masked else ())

    def cost(self, site: Site) -> Cost:
        tokens, extra = site.tokens, site.extra_tokens
        # every query sees the extra keys, extra queries see everything
        more = extra * (2 * tokens + extra)
        rows, total, visits, tile = [], 0, 0, 0
        for group in self.groups(site.grid, site.heads):
            heads = group.count(site)
            boxes = fitted(*group.views)
            pairs = math.prod(view.pairs for view in group.views) + more
            tile = max(tile, tile_elements(boxes, site.width))
            total += heads * pairs
            visits += heads * (visited(boxes) + more)
            rows.append(BranchCost(group.name, pairs, 4 * pairs * heads * site.head_dim))
        return Cost(
            pairs=round(total / site.heads),
            visited_pairs=round(visits / site.heads),
            attention_flops=sum(row.attention_flops for row in rows),
            qkv_flops=2 * tokens * site.dim * 3 * site.width,
            out_flops=2 * tokens * site.inner * site.dim,
            # q, k, v and the output, q once more, and a tile of them all
            peak_elements=5 * tokens * site.width + tile,
            # the input, q, k, v and the output; q and k once more before their norm
            saved_elements=(5 + 2 * site.qk_norm) * tokens * site.width,
            branches=tuple(rows),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        groups = self.groups(site.grid, site.heads)
        if len(groups) == 1:
            return seen_by(groups[0].views, site.grid, queries)[None]
        count = site.tokens if queries is None else len(queries)
        seen = np.zeros((site.heads, count, site.tokens), dtype=bool)
        for group in groups:
            seen[list(group.heads or range(site.heads))] = seen_by(group.views, site.grid, queries)
        return seen

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.logical_or.reduce(
            [spread(matrices(group.views), tokens, site.grid) for group in self.groups(site.grid, site.heads)]
        )


def one_to(most: int) -> str:
    """Legal values, for an error message: ``1 to 7``, or 1 where there is no other."""
    return f"1 to {most}" if most > 1 else "1"


# --- influence ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def matrix(view: AxisView) -> np.ndarray:
    """(L, L) bool of one axis: does the token of a row see that of a column?"""
    order = np.asarray(view.order())
    places = np.arange(view.length)
    seen = (places >= np.asarray(view.low)[:, None]) & (places < np.asarray(view.high)[:, None])
    out = np.zeros_like(seen)
    out[order[:, None], order[None, :]] = seen
    return out


def matrices(views: Views) -> list[np.ndarray]:
    return [matrix(view) for view in views]


def seen_by(views: Views, grid: Grid, queries: Sequence[int] | None) -> np.ndarray:
    """(queries, N) bool; None means every query."""
    return product_rows(matrices(views), grid, queries)


def product_rows(axes: Sequence[np.ndarray], grid: Grid, queries: Sequence[int] | None) -> np.ndarray:
    """Rows of the product of three per-axis relations: (queries, N) bool; None means every query."""
    wanted = np.arange(grid.tokens) if queries is None else np.asarray(queries, dtype=int)
    frame, rest = np.divmod(wanted, grid.h * grid.w)
    row, column = np.divmod(rest, grid.w)
    t, h, w = axes
    box = t[frame][:, :, None, None] & h[row][:, None, :, None] & w[column][:, None, None, :]
    return box.reshape(len(wanted), grid.tokens)


def spread(axes: Sequence[np.ndarray], tokens: np.ndarray, grid: Grid) -> np.ndarray:
    """Sets of tokens (sets, N) → the union of what their tokens see, axis by axis."""
    maps = tokens.reshape(-1, *grid).astype(np.float32)
    for axis, seen in enumerate(axes, 1):
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ seen.astype(np.float32) > 0, -1, axis).astype(np.float32)
    return maps.reshape(len(tokens), -1) > 0


# --- the module -----------------------------------------------------------------------------------------------------


def plain_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """The sizes as constants: a compiler makes symbols of ints that change, and boxes are made for one grid."""
    t, h, w = (len(range(n)) for n in grid)
    return t, h, w


class ViewsAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    @constant_in_graphs
    def plan(self, t: int, h: int, w: int) -> tuple[tuple[tuple[int, ...] | None, Boxes], ...]:
        """Heads (None: all) and their boxes at a grid."""
        spec: Any = self.spec
        return tuple((group.heads, fitted(*group.views)) for group in spec.groups(Grid(t, h, w), self.site.heads))

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        extra = call.extra
        if extra is not None:
            refuse_segments(spec.name, extra)
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        keys, values, valid, always = k, v, call.key_valid, 0
        if extra is not None:
            always = extra.k.shape[1]
            keys, values = torch.cat([k, extra.k], dim=1), torch.cat([v, extra.v], dim=1)
            valid = joined_valid(x, valid, extra.key_mask, always)
        plan = self.plan(*plain_grid(call.grid))
        outs = []
        for heads, at in plan:
            job = Job(at, always, valid, scale=spec.score_scale(self.site.head_dim), kernel=spec.kernel)
            parts = (z if heads is None else pick(z, heads) for z in (q, keys, values))
            outs.append(attend_boxes(*parts, job))  # (B, N, heads of the group, D)
        y = host.out(in_order(outs, [heads for heads, _ in plan]).flatten(2))
        if extra is None:
            return y
        return y, attend_extra(extra, k, v, call.key_valid, spec.kernel)


def joined_valid(x: Tensor, valid: Tensor | None, more: Tensor | None, count: int) -> Tensor | None:
    """(B, N + count): which of the grid's keys and of `count` others take part; None where all do."""
    if valid is None and more is None:
        return None
    own = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    rest = torch.ones(x.shape[0], count, dtype=torch.bool, device=x.device) if more is None else more
    return torch.cat([own, rest], dim=1)


def in_order(outs: list[Tensor], groups: list[tuple[int, ...] | None]) -> Tensor:
    """Groups of heads (B, N, heads, D) → all heads in the host's order."""
    if len(outs) == 1:
        return outs[0]
    order = [head for heads in groups if heads is not None for head in heads]
    joined = torch.cat(outs, dim=2)
    return joined if order == sorted(order) else joined[:, :, [order.index(head) for head in range(len(order))]]
