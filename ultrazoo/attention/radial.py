"""Radial attention (arXiv 2506.19852): static bands between frames that thin out with their distance in time.

A named composition of `block_sparse` with the selector ``radial``; see `parts.radial` for the formula. Training-free at the
length a model was trained at; for videos two to four times as long the source tunes LoRAs of rank 32 on q, k, v and o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.orders import RasterSpec
from .parts.radial import RadialMapSpec


@dataclass(frozen=True, kw_only=True)
class RadialSpec(AttentionSpec):
    """O(N log N) pairs: a token sees its own and the next frames wholly, and ever thinner bands of those farther away."""

    name: ClassVar[str] = "radial"
    source: ClassVar[str] = "Radial Attention, arXiv 2506.19852; code mit-han-lab/radial-attention 72788d4"
    formula: ClassVar[str] = "y_i = W_o sum_{j: |k - l| <= w(d), d = |t_i - t_j|} softmax(q_i k_j / sqrt(D)) v_j"

    decay: float = option(0.2, "width of bands; 0.2 for Wan, 0.95 for HunyuanVideo", gt=0)
    block: int = option(128, "tokens per block", ge=1)
    width: int = option(128, "narrowest band, and where thinning begins, in tokens", ge=1)
    sink: int = option(1, "first frames that all see; the source has 1 for Wan, 0 for HunyuanVideo", ge=0)
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        size = site.grid.h * site.grid.w
        if self.block > size and site.grid.t > 1:
            rule = f"blocks of {self.block} tokens are larger than a frame of {size}"
            return [Problem("block", rule, f"at most {size}")]
        return []

    def expand(self, site: Site) -> AttentionSpec:
        if self.problems(site):
            return self
        return BlockSparseSpec(
            order=RasterSpec(block=self.block),
            selector=RadialMapSpec(decay=self.decay, width=self.width, sink=self.sink),
            kernel=self.kernel,
        )

    def traits(self) -> Traits:
        inner = BlockSparseSpec(selector=RadialMapSpec()).traits()
        start = Start("training-free", "arXiv 2506.19852: at trained length, first 12 steps and first layer dense")
        return Traits(
            start=start, export=inner.export, min_grid=inner.min_grid, fullgraph=inner.fullgraph, notes=inner.notes
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(5, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(block=6, width=6, decay=0.2), site.at(extra=(Segment("text", 4),))),
            (cls(block=8, width=3, decay=0.3, sink=0), site.at(grid=Grid(7, 3, 5), rope=None)),
            (cls(block=16), site.at(grid=Grid(1, 4, 5))),
        ]
