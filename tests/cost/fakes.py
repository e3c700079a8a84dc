"""Closed-form specs for tests of the cost model, the pictures and the reports: no torch, no registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, NamedTuple

import numpy as np

from ultrazoo.grid import Grid
from ultrazoo.spec import (
    AttentionSpec,
    BackboneCost,
    BackboneSpec,
    BranchCost,
    Cost,
    Site,
    Start,
    Traits,
    option,
)


@dataclass(frozen=True, kw_only=True)
class Rows(AttentionSpec):
    """Two branches: everything in the query's own frame, and everything in the query's own row of tokens."""

    name: ClassVar[str] = "test/rows"
    extra: int = option(7, "parameters of its own")

    def cost(self, site: Site) -> Cost:
        _, h, w = site.grid
        frame, row = site.tokens * h * w, site.tokens * w
        flops = [4 * pairs * site.inner for pairs in (frame, row)]
        return Cost(
            pairs=frame + row,
            attention_flops=sum(flops),
            qkv_flops=6 * site.tokens * site.dim * site.inner,
            out_flops=2 * site.tokens * site.dim * site.inner,
            other_flops=11,
            parameters=self.extra,
            peak_elements=5 * site.tokens * site.dim,
            saved_elements=4 * site.tokens * site.dim,
            branches=(BranchCost("frame", frame, flops[0]), BranchCost("row", row, flops[1], parameters=self.extra)),
        )

    def visible_by_branch(self, site: Site, queries: Sequence[int]) -> dict[str, np.ndarray]:
        _, h, w = site.grid
        tokens = np.arange(site.tokens)
        q = np.asarray(queries)
        return {
            "frame": (tokens // (h * w) == q[:, None] // (h * w))[None],
            "row": (tokens // w == q[:, None] // w)[None],
        }

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        queries = range(site.tokens) if queries is None else queries
        return np.logical_or.reduce(list(self.visible_by_branch(site, queries).values()))

    def traits(self) -> Traits:
        return Traits(start=Start("needs tuning", "arXiv:0000.00000"))


@dataclass(frozen=True, kw_only=True)
class Share(AttentionSpec):
    """Computes 1/`divisor` of full attention's pairs; sees everything."""

    name: ClassVar[str] = "test/share"
    divisor: int = option(1, "full attention's pairs over these")
    visited: int = option(1, "visited pairs over computed ones")

    def cost(self, site: Site) -> Cost:
        pairs = site.tokens**2 // self.divisor
        return Cost(
            pairs=pairs,
            attention_flops=4 * pairs * site.inner,
            qkv_flops=6 * site.tokens * site.dim * site.inner,
            out_flops=2 * site.tokens * site.dim * site.inner,
            visited_pairs=pairs * self.visited if self.visited != 1 else None,
            peak_elements=4 * site.tokens * site.dim,
            saved_elements=4 * site.tokens * site.dim,
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def traits(self) -> Traits:
        return Traits(start=Start("exact"))


@dataclass(frozen=True, kw_only=True)
class Toy(BackboneSpec):
    """A stack of attention and an MLP of width 4 C; the defaults are Wan2.1-1.3B's attention sizes."""

    name: ClassVar[str] = "test/toy"
    dim: int = option(1536, "channels")
    heads: int = option(12, "heads")
    depth: int = option(30, "layers")
    outside: int = field(default=1000)

    def groups(self) -> dict[str, int]:
        return {"": self.depth}

    def sites(self, grid: Grid) -> tuple[Site, ...]:
        return tuple(
            Site(self.dim, self.heads, self.dim // self.heads, layer, self.depth, grid) for layer in range(self.depth)
        )

    def cost(self, grid: Grid) -> BackboneCost:
        n, c = grid.tokens, self.dim
        return BackboneCost(
            parameters=self.depth * 12 * c * c,
            layer_flops=(16 * n * c * c,) * self.depth,
            outside_flops=self.outside,
            stream_elements=2 * n * c,
            layer_peak_elements=(9 * n * c,) * self.depth,
            layer_saved_elements=(10 * n * c,) * self.depth,
        )


class Range(NamedTuple):
    first: int
    last: int
    layers: dict[int, AttentionSpec]


class Sampler(NamedTuple):
    steps: int
    guidance: float | None = None


def t3_ratio(grid: Grid, counts: list[tuple[int, int, int]]) -> Fraction:
    """Full attention's pairs over those of two layouts (near and far) with `counts[i]` groups per axis in layer i."""
    n = Fraction(grid.tokens)
    kept = sum(2 * n * n / (a * b * c) for a, b, c in counts)
    return len(counts) * n * n / kept
