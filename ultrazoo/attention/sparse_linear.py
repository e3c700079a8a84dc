"""SLA, sparse-linear attention (arXiv 2509.24006): top-k blocks by softmax, plus a learned map of linear attention.

``O = O_s + Proj(O_l)``, ``O_l = phi(q) H / (phi(q) z + 1e-5)``, ``H = sum phi(k)^T v``. Two designs have this name.
``released`` (the code): H over every key, blocks of 128 queries and 64 keys, the best 20 %. ``paper``: H over blocks that
are neither among the best 5 % nor the lowest 10 %, blocks of 64. Proj is one D x D map with bias for all heads, zero at
the start. A named composition of `block_sparse`. At least one block is kept where the source's rounding keeps none; blocks
are ranked by keys less their mean, as in the code, which ranks as the paper's softmax does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.far_linear import LinearFarSpec
from .parts.orders import RasterSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec


@dataclass(frozen=True, kw_only=True)
class SparseLinearSpec(AttentionSpec):
    """Softmax over the best blocks, and a projection of linear attention that starts at zero."""

    name: ClassVar[str] = "sparse_linear"
    source: ClassVar[str] = "SLA, arXiv 2509.24006; code thu-ml/SLA d973e55"
    formula: ClassVar[str] = (
        "y_i = W_o [sum_{j in topk} softmax(q_i k_j / sqrt(D)) v_j + Proj(phi(q_i) H / (phi(q_i) z + eps))]"
    )

    form: Literal["released", "paper"] = option("released", "linear over all keys, or over blocks in between")
    share: float | None = option(
        None, "share of the key blocks for the softmax; null: 0.2 released, 0.05 paper", gt=0, le=1
    )
    block: tuple[int, int] | None = option(
        None, "tokens per block of queries and of keys; null: 128 and 64 released, 64 and 64 paper", ge=1
    )
    skip: float | None = option(None, "paper: share of the lowest key blocks that get nothing; null: 0.1", ge=0, lt=1)
    phi: Literal["softmax", "elu", "relu"] = option(
        "softmax", "features: softmax over a head's channels, elu + 1, relu"
    )
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        if self.skip is not None and self.form == "released":
            return [Problem("skip", "the released form's linear part runs over every key", "use null, or form: paper")]
        return []

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition()

    def _composition(self) -> BlockSparseSpec:
        paper = self.form == "paper"
        share = self.share if self.share is not None else 0.05 if paper else 0.2
        skip = self.skip if self.skip is not None else 0.1 if paper else 0.0
        rule = TopKSpec(share=share, rounding="down")
        return BlockSparseSpec(
            order=RasterSpec(block=self.block or ((64, 64) if paper else (128, 64))),
            selector=PooledSpec(rule=rule, centre=True),
            far=LinearFarSpec(keys="complement" if paper else "all", phi=self.phi, join="proj", skip=skip),
            kernel=self.kernel,
        )

    def traits(self) -> Traits:
        inner = self._composition().traits()
        if inner.exact_at_init:
            return replace(inner, start=Start("exact", "share 1, Proj 0"))
        start = Start("needs tuning", "arXiv 2509.24006: 2 000 steps; a fresh block is its top-k part alone")
        return replace(inner, start=start)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        text = (Segment("text", 5), Segment("reference", 6, rows="pattern", keys="compete"))
        return [
            (cls(block=(8, 4)), site.at(extra=text)),
            (cls(form="paper", block=(6, 6), share=0.2, phi="elu"), site.at(extra=text)),
            (cls(form="paper", block=(4, 4), skip=0.3), site.at(grid=Grid(1, 4, 5), rope=None, qk_norm=False)),
            (cls(share=1.0, block=(8, 4), phi="relu"), site.at(grid=Grid(2, 3, 5), has_timestep=False)),
        ]
