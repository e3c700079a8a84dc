"""SpargeAttention2 (arXiv 2602.13515): the best share of key blocks, united with those that hold a share of the softmax mass.

``P = softmax(s q̄ k̄^T)`` over blocks of 128 queries and 64 keys, ``M_i = topk(P_i, k) or topp(P_i, p)``. A named composition
of `block_sparse`. Top-k alone fails on flat rows, top-p on rows with sinks. The source trains the model to its dense self.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.orders import RasterSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKOrPSpec


@dataclass(frozen=True, kw_only=True)
class Sparge2Spec(AttentionSpec):
    """Top-k united with top-p."""

    name: ClassVar[str] = "sparge2"
    source: ClassVar[str] = "SpargeAttention2, arXiv 2602.13515"
    formula: ClassVar[str] = (
        "y_i = W_o sum_{j in M(i)} softmax(q_i k_j / sqrt(D)) v_j, M = topk(P) or topp(P), P = softmax(q_c k_c^T)"
    )

    share: float = option(0.03, "share of the key blocks that top-k keeps", gt=0, le=1)
    p: float = option(0.2, "mass that top-p keeps; 0.2 for 1.3B, 0.16 for 14B", gt=0, le=1)
    block: tuple[int, ...] = option((128, 64), "tokens per block: of queries, of keys", ge=1)
    expected: float = option(0.05, "kept share that a plan assumes; the source reports about 0.05", gt=0, le=1)
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        return RasterSpec(block=self.block).problems(site)

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition()

    def _composition(self) -> BlockSparseSpec:
        rule = TopKOrPSpec(share=self.share, p=self.p, expected=self.expected)
        return BlockSparseSpec(order=RasterSpec(block=self.block), selector=PooledSpec(rule=rule), kernel=self.kernel)

    def traits(self) -> Traits:
        inner = self._composition().traits()
        return Traits(
            start=inner.start
            if inner.exact_at_init
            else Start("needs tuning", "arXiv 2602.13515: 500 steps towards the dense model; untrained it collapses"),
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
            (cls(share=0.1, p=0.3, block=(8, 4)), site.at(extra=(Segment("text", 4),))),
            (cls(share=0.2, p=0.5, block=(6, 6)), site.at(grid=Grid(1, 5, 5), rope=None)),
        ]
