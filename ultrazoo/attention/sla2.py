"""SLA2 (arXiv 2602.12675): a learned router picks blocks for the softmax, linear attention takes the rest, joined convexly.

``O = alpha O_s + (1 - alpha) O_l``; ``P = softmax(proj_q(q̄) proj_k(k̄)^T / sqrt(D))``; keys are centred by their mean. In the
first stage the choice is soft, ``sigmoid(P / tau + lambda_i)`` with rows that add up to the kept number of blocks, so that
the router learns to imitate full attention (``router: soft``, dense cost). In the second the choice is hard and the router
frozen; so it is here, its parameters taking no gradient. A named composition of `block_sparse`.

Decisions where the paper is silent: alpha is the sigmoid of a number per head (the paper's, indexed by position, fits one
size alone), 0.9 at the start; a soft weight multiplies the exponential of the softmax and one minus it the linear part; a
kept number is rounded up where the choice is hard; where a query has no key left, O_l is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.far_linear import LinearFarSpec
from .parts.orders import RasterSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec


@dataclass(frozen=True, kw_only=True)
class Sla2Spec(AttentionSpec):
    """Learned top-k blocks by softmax, the complement by linear attention, a convex weight per head."""

    name: ClassVar[str] = "sla2"
    source: ClassVar[str] = "SLA2, arXiv 2602.12675, sections 3-5 and Algorithm 2"
    formula: ClassVar[str] = (
        "y_i = W_o [a sum_{j in M(i)} softmax(q_i k_j / sqrt(D)) v_j + (1 - a) phi(q_i) H_i / (phi(q_i) z_i)], "
        "M = topk(proj_q(qc) proj_k(kc)^T)"
    )

    share: float = option(0.05, "share of the key blocks for the softmax: 0.05, 0.04 or 0.03 in the paper", gt=0, le=1)
    router: Literal["hard", "soft"] = option("hard", "choose blocks by a frozen router, or weigh all and train it")
    tau: float = option(0.1, "temperature of the soft router", gt=0)
    alpha: float = option(0.9, "weight of the softmax part at the start, per head", gt=0, lt=1)
    block: tuple[int, int] = option((128, 64), "tokens per block of queries and of keys", ge=1)
    phi: Literal["softmax", "elu", "relu"] = option(
        "softmax", "features: softmax over a head's channels, elu + 1, relu"
    )
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def expand(self, site: Site) -> AttentionSpec:
        return self._composition()

    def _composition(self) -> BlockSparseSpec:
        rule = TopKSpec(share=self.share, soft=self.tau if self.router == "soft" else None)
        return BlockSparseSpec(
            order=RasterSpec(block=self.block),
            selector=PooledSpec(rule=rule, centre=True, project=True),
            far=LinearFarSpec(keys="complement", phi=self.phi, join="alpha", alpha=self.alpha, centre=True, eps=0.0),
            kernel=self.kernel,
        )

    def traits(self) -> Traits:
        inner = self._composition().traits()
        start = Start("needs tuning", "arXiv 2602.12675: the router first, then 500 steps of the model")
        return replace(inner, start=start)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        text = (Segment("text", 5), Segment("reference", 6, rows="pattern", keys="compete"))
        return [
            (cls(router="soft", share=0.2, block=(8, 6)), site.at(grid=Grid(2, 3, 5), extra=text)),
            (cls(share=0.2, block=(8, 4)), site.at(extra=text)),
            (cls(share=0.3, block=(4, 4), phi="elu"), site.at(grid=Grid(1, 4, 5), rope=None, qk_norm=False)),
        ]
