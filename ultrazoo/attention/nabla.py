"""NABLA (Kandinsky 5): per query block the fewest key blocks that hold a share of the pooled softmax, and a sliding window.

A named composition of `block_sparse`. Blocks are tiles of 8 x 8 tokens in one frame, which the source arranges along a
fractal; the order of blocks changes nothing. The window is STA's (arXiv 2502.04507).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.orders import TilesSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopPSpec
from .parts.selectors import SelectorSpec, UnionSpec
from .parts.sliding import SlidingSpec


@dataclass(frozen=True, kw_only=True)
class NablaSpec(AttentionSpec):
    """Top-p of block means, united with a window of tiles."""

    name: ClassVar[str] = "nabla"
    source: ClassVar[str] = "NABLA, arXiv 2507.13546 (Kandinsky 5)"
    formula: ClassVar[str] = (
        "y_i = W_o sum_{j in P(i) or W(i)} softmax(q_i k_j / sqrt(D)) v_j, P(i): top-p of softmax(q_c k_c^T)"
    )

    tile: tuple[int, ...] = option((1, 8, 8), "tokens (T, H, W) per block", ge=1)
    p: float = option(0.9, "mass of the row's softmax over block scores", gt=0, le=1)
    window: tuple[int, ...] | None = option((11, 3, 3), "tiles that are always seen; null: none", ge=1)
    expected: float = option(0.3, "kept share that a plan assumes; the data decides", gt=0, le=1)
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        found = TilesSpec(tile=self.tile).problems(site)
        if self.window is None or found:
            return found
        sliding = SlidingSpec(window=self.window)
        found = sliding.problems(site)
        return found or sliding.place_problems(TilesSpec(tile=self.tile).place(site.grid), site)

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition()

    def _composition(self) -> BlockSparseSpec:
        selector: SelectorSpec = PooledSpec(rule=TopPSpec(p=self.p, expected=self.expected))
        if self.window is not None:
            selector = UnionSpec(of=(selector, SlidingSpec(window=self.window)))
        return BlockSparseSpec(order=TilesSpec(tile=self.tile), selector=selector, kernel=self.kernel)

    def traits(self) -> Traits:
        inner = self._composition().traits()
        return Traits(
            start=inner.start
            if inner.exact_at_init
            else Start("training-free", "arXiv 2507.13546: used in training or without it"),
            exact_at_init=inner.exact_at_init,
            export=inner.export,
            visible=inner.visible,
            min_grid=inner.min_grid,
            selects=inner.selects,
            fullgraph=inner.fullgraph,
            notes=inner.notes,
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(tile=(1, 2, 2), p=0.5, window=(1, 3, 1)), site.at(extra=(Segment("text", 4),))),
            (cls(tile=(1, 2, 3), p=0.4, window=None), site.at(grid=Grid(1, 5, 6), rope=None)),
        ]
