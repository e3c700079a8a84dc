"""Video sparse attention, VSA (arXiv 2505.13389): tiles of 64 tokens; attention among tile means picks the tiles for fine
attention and is itself added through a gate.

``O = O_fine + G(x) · O_coarse``, G linear, per token and channel, zero at the start, no sigmoid. A named composition of
`block_sparse`. The form for packed sequences (FastVideo's VSA-H3) is for extra tokens. Tiles of them never
cross a segment and take part in the coarse attention. ``extra_keys: always`` is its *exempt* mode: top-k over the grid's tiles,
and every tile of the segment. ``extra_keys: compete`` is its *compete* mode: top-k over both, k being that of the grid's tiles plus
one for every competing tile, as many visits as if they were exempt. Rows of extra tokens see everything, as its prompt rows do, unless
the host's segment says otherwise; its dense first steps and dense layers are a recipe's ``steps`` and layer keys. We depart in two places: a gate of zeros is computed
too, and of equal scores the grid's tile comes before an extra one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.far import CoarseSpec, DropSpec
from .parts.orders import TilesSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec


@dataclass(frozen=True, kw_only=True)
class VideoSparseSpec(AttentionSpec):
    """The best ``1 - sparsity`` of the tiles for every tile and head, and gated attention among all tiles."""

    name: ClassVar[str] = "video_sparse"
    source: ClassVar[str] = "VSA, arXiv 2505.13389; code FastVideo 2f3d407 (packed: #1695, #1731)"
    formula: ClassVar[str] = (
        "y = W_o (softmax over top-k tiles of q k^T / sqrt(D) v + G(x) softmax(q_c k_c^T / sqrt(D)) v_c)"
    )

    tile: tuple[int, ...] = option((4, 4, 4), "tokens (T, H, W) per tile", ge=1)
    image_tile: tuple[int, ...] | None = option((1, 8, 8), "the same at T = 1; null: `tile`, cut to one frame", ge=1)
    sparsity: float = option(0.9, "share of the tiles that a tile does not visit", ge=0, lt=1)
    gate: Literal["linear", "none"] = option("linear", "of the coarse attention; none leaves it out")
    extra_keys: Literal["host", "always", "compete"] = option(
        "host",
        "keys of extra tokens: seen by all (exempt), or chosen like others (compete); host: as their segment says",
    )
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        return self._order().problems(site)

    def _order(self) -> TilesSpec:
        return TilesSpec(tile=self.tile, image_tile=self.image_tile)

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition()

    def _composition(self) -> BlockSparseSpec:
        return BlockSparseSpec(
            order=self._order(),
            selector=PooledSpec(rule=TopKSpec(share=round(1 - self.sparsity, 12), competing="added")),
            far=CoarseSpec() if self.gate == "linear" else DropSpec(),
            extra_keys=self.extra_keys,
            kernel=self.kernel,
        )

    def traits(self) -> Traits:
        inner = self._composition().traits()
        start = Start("needs tuning", "arXiv 2505.13389: sparsity raised by 0.03 every 50 steps, about 4 000 steps")
        return Traits(
            start=Start("exact", "sparsity 0, gate 0") if inner.exact_at_init else start,
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
        packed = (Segment("text", 9, keys="compete"), Segment("audio", 3), Segment("reference", 10, keys="compete"))
        return [
            (cls(tile=(2, 2, 3), sparsity=0.7), site.at(extra=(Segment("text", 5),))),
            (cls(tile=(4, 4, 4), image_tile=(1, 2, 3), sparsity=0.5), site.at(grid=Grid(1, 4, 5), rope=None)),
            (cls(tile=(2, 3, 2), sparsity=0.0), site.at(grid=Grid(2, 4, 5))),
            (cls(tile=(2, 2, 2), sparsity=0.7, extra_keys="compete"), site.at(extra=(Segment("text", 11),))),
            (cls(tile=(2, 2, 2), sparsity=0.8), site.at(grid=Grid(2, 5, 4), extra=packed)),
        ]
