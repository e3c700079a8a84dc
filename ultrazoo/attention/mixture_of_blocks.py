"""VMoBA (arXiv 2506.23858): key blocks for single queries by ``q · k̄``, from a partition that changes with the layer.

Layers take turns: blocks of whole frames (1-D), columns of patches through all frames (2-D), boxes (3-D). A query's own block
is always seen; of the others, the highest scores are, until they hold the share `p` of all scores, which are moved and scaled to
0 … 1 before. The paper ranks all pairs of a head together (``scope: head``); MoBA (arXiv 2502.13189) and the released setting
rank each query's blocks (``scope: query``), MoBA a number of them (`top`). A named composition of `block_sparse`.

Departures: the released code wants sizes that blocks divide, here blocks at the far borders are smaller; it ranks a batch as one
head where packed, here each sample by itself; at equal scores it keeps any, here the first, or over a head all.
MoBA's causal mask is for language and is left out, as in VMoBA. The dense first 12 steps are a recipe's `steps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.by_query import ByQuerySpec
from .parts.routed import RoutedSpec


@dataclass(frozen=True, kw_only=True)
class MixtureOfBlocksSpec(AttentionSpec):
    """Own blocks and the best of the others, per query or over a head."""

    name: ClassVar[str] = "mixture_of_blocks"
    source: ClassVar[str] = "VMoBA, arXiv 2506.23858; MoBA, arXiv 2502.13189; code KwaiVGI/VMoBA, src/vmoba.py"
    formula: ClassVar[str] = (
        "y_i = W_o sum_{j in M(i)} softmax(q_i k_j / sqrt(D)) v_j, M: own block and the highest q_i kc_j up to a mass of p"
    )

    frames: int = option(2, "1-D: frames per block, whole ones", ge=1)
    column: tuple[int, ...] = option((3, 4), "2-D: tokens (H, W) per block, through all frames", ge=1)
    box: tuple[int, ...] = option((4, 6, 4), "3-D: tokens (T, H, W) per block", ge=1)
    partition: tuple[int, ...] = option((1, 1, 1), "consecutive layers with 1-D, 2-D and 3-D blocks, then again", ge=0)
    first: int = option(0, "the layer that the partition starts from", ge=0)
    scope: Literal["head", "query"] = option("head", "what is ranked: all pairs of a head, or each query's blocks")
    p: float | None = option(
        None,
        "mass of the scores, moved and scaled to 0 … 1, that is kept; null: 0.25 where there is no top",
        gt=0,
        le=1,
    )
    top: tuple[int, ...] | None = option(
        None, "blocks per query of 1-D, 2-D and 3-D layers, own one included, instead of p; at most all", ge=1
    )
    expected: float = option(0.18, "kept share that a plan assumes for p; the data decides", gt=0, le=1)
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        found = []
        wanted = (("column", 2, "(H, W)"), ("box", 3, "(T, H, W)"), ("partition", 3, "of 1-D, 2-D and 3-D layers"))
        for path, count, meaning in (*wanted, ("top", 3, "of 1-D, 2-D and 3-D layers")):
            given = getattr(self, path)
            if given is not None and len(given) != count:
                found.append(Problem(path, f"got {len(given)} numbers", f"give {count}: {meaning}"))
        if self.p is not None and self.top is not None:
            found.append(Problem("p", "top is given as well", "give one of them"))
        if not any(self.partition):
            found.append(Problem("partition", "has no layer", "at least one number above 0"))
        return found

    def dimensions(self, layer: int) -> int:
        """1, 2 or 3: how the layer is cut. Layers before `first` go on backwards."""
        at = (layer - self.first) % sum(self.partition)
        one, two, _ = self.partition
        return 1 if at < one else 2 if at < one + two else 3

    def tile(self, layer: int) -> tuple[int, int, int]:
        """Tokens (T, H, W) per block; 0 is the whole axis."""
        dimensions = self.dimensions(layer)
        if dimensions == 1:
            return (self.frames, 0, 0)
        t, h, w = (0, *self.column) if dimensions == 2 else self.box
        return (t, h, w)

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition(site.layer)

    def _composition(self, layer: int) -> BlockSparseSpec:
        count = None if self.top is None else self.top[self.dimensions(layer) - 1]
        selector = RoutedSpec(scope=self.scope, p=self.p, count=count, expected=self.expected)
        return BlockSparseSpec(order=ByQuerySpec(tile=self.tile(layer)), selector=selector, kernel=self.kernel)

    def traits(self) -> Traits:
        inner = self._composition(0).traits()
        if inner.exact_at_init:
            return replace(inner, start=Start("exact", "p 1"))
        return replace(
            inner, start=Start("needs tuning", "arXiv 2506.23858 trains with it; without, 12 first steps dense")
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True, layers=3)
        small = cls(frames=1, column=(2, 3), box=(2, 2, 3))
        video = Segment("reference", 6, grid=Grid(2, 1, 3), rows="pattern", keys="compete")
        return [
            (small, site.at(extra=(Segment("text", 5), video), layer=2)),
            (replace(small, scope="query", p=0.4), site.at(layer=1, rope=None)),
            (replace(small, scope="query", top=(2, 3, 4)), site.at(qk_norm=False)),
            (replace(small, top=(2, 3, 4)), site.at(grid=Grid(2, 4, 5), layer=2, has_timestep=False)),
            (small, site.at(grid=Grid(1, 4, 5), layer=1)),
        ]
