"""PISA, piecewise sparse attention (arXiv 2602.01077): exact where keys and values vary together, a Taylor term elsewhere.

``num = sum_M e^{s q k} v + sum_{1-M} n_j e^{s q k̄_j} v̄_j + (s g / N) q sum_j H_j`` with ``H_j = sum_{r in j} (k_r - k̄_j)^T
v_r``, g the far field's part of the denominator, which gains nothing of first order. Blocks by top-k of ``s q̄_i k̄_j + log
(||H_j||_F + 1e-5)``; the softmax over j that the source takes first ranks the same. A named composition of `block_sparse`.
SGLang's variant ranks by the variance of a block's keys and stops at order 0. We hold block states a few at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.far import MeanSpec
from .parts.orders import RasterSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec

BIASES: dict[str, Literal["none", "log_variance", "log_norm"]] = {
    "norm": "log_norm",
    "variance": "log_variance",
    "plain": "none",
}


@dataclass(frozen=True, kw_only=True)
class PisaSpec(AttentionSpec):
    """Top-k blocks exact, the others by their means and one first-order term for all."""

    name: ClassVar[str] = "pisa"
    source: ClassVar[str] = "PISA, arXiv 2602.01077; code piecewise-sparse-attention 8604494; SGLang piecewise_attn"
    formula: ClassVar[str] = (
        "y_i = W_o [sum_M e^{s q k} v + sum_{not M} n_j e^{s q kc_j} vc_j + (s g / N) q sum_j H_j] / [denominators of the first two]"
    )

    density: float = option(0.1, "share of the key blocks that are exact, rounded down; at least one", gt=0, le=1)
    block: int = option(64, "tokens per block", ge=1)
    score: Literal["norm", "variance", "plain"] = option(
        "norm", "added to s qc kc: log ||H_j||, log of the variance of the block's keys (SGLang), or nothing"
    )
    order: Literal[0, 1] = option(1, "of the far field: block means, or with the first-order term")
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def expand(self, site: Site) -> AttentionSpec:
        return self._composition()

    def _composition(self) -> BlockSparseSpec:
        rule = TopKSpec(share=self.density, rounding="down")
        selector = PooledSpec(rule=rule, key_bias=BIASES[self.score])
        far = MeanSpec(order=self.order)
        return BlockSparseSpec(order=RasterSpec(block=self.block), selector=selector, far=far, kernel=self.kernel)

    def traits(self) -> Traits:
        inner = self._composition().traits()
        if inner.exact_at_init:
            return replace(inner, start=Start("exact", "density 1"))
        return replace(inner, start=Start("training-free", "arXiv 2602.01077, dense up to a start layer"))

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        text = (Segment("text", 5), Segment("reference", 6, rows="pattern", keys="compete"))
        return [
            (cls(density=0.2, block=6), site.at(extra=text)),
            (cls(density=0.3, block=8, score="variance", order=0), site.at(grid=Grid(2, 3, 5))),
            (cls(block=4, score="plain"), site.at(grid=Grid(1, 4, 5), rope=None, qk_norm=False)),
            (cls(density=1.0, block=8), site.at(grid=Grid(2, 3, 5), has_timestep=False)),
        ]
