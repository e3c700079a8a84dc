"""Sol-Attn (arXiv 2607.24027): blocks that score above mean + tau · standard deviation are exact, all others are their means.

``num = sum_M e^{s q k} v + sum_{1-M} e^{s q k̄_j} sum v``, ``den = sum_M e^{s q k} + sum_{1-M} n_j e^{s q k̄_j}``. M is one
where ``s q̄_i k̄_j > mu_i + tau sigma_i``, in the band of neighbouring blocks and in the sink; mu and sigma are moments over
pooled keys, so there is no sorting. A named composition of `block_sparse`; the band stands in the published code, not in
the paper. Prefix tokens that a host gives as extra tokens with ``keys: always`` are a sink as well; what their own rows
see is the host's ``rows`` policy. The paper's dense first 20 % of the steps are a recipe's `steps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.far import MeanSpec
from .parts.orders import CurveSpec, OrderSpec, RasterSpec
from .parts.pooled import PooledSpec
from .parts.ranges import TokensSpec
from .parts.rules import MeanStdSpec
from .parts.selectors import BandSpec, SelectorSpec, UnionSpec


@dataclass(frozen=True, kw_only=True)
class SolSpec(AttentionSpec):
    """A threshold from moments of block scores, and block means for what lies below it."""

    name: ClassVar[str] = "sol"
    source: ClassVar[str] = "Sol-Attn, arXiv 2607.24027; code NVlabs/Sana, sparse_backends/sol_attn"
    formula: ClassVar[str] = (
        "y_i = W_o [sum_M e^{s q k} v + sum_{not M} n_j e^{s q kc_j} vc_j] / [the same sums without v], M = s qc kc > mu + tau sigma"
    )

    tau: float | None = option(1.0, "standard deviations above the mean; null: every block, dense")
    moments: Literal["diag", "exact"] = option("diag", "variance from the pooled keys' channels, or of the scores")
    order: Literal["raster", "morton"] = option("raster", "of tokens: as they come, or a Morton curve with x lowest")
    block: int = option(64, "tokens per block", ge=1)
    band: int = option(1, "neighbouring blocks to either side that are always exact; 0 is the own block", ge=0)
    sink: tuple[int, int] | None = option(None, "first token and number of grid tokens that are always exact", ge=0)
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        if self.sink is None:
            return []
        start, count = self.sink
        if count < 1 or start + count > site.tokens:
            rule = f"{count} tokens from token {start} on, of a grid of {site.tokens}"
            return [Problem("sink", rule, f"at least 1 token, start + number at most {site.tokens}; null for none")]
        return []

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition()

    def _composition(self) -> BlockSparseSpec:
        order: OrderSpec = RasterSpec(block=self.block)
        if self.order == "morton":
            order = CurveSpec(curve="morton", block=self.block)
        of: list[SelectorSpec] = [PooledSpec(rule=MeanStdSpec(tau=self.tau, moments=self.moments))]
        of.append(BandSpec(width=self.band))
        if self.sink is not None:
            of.append(TokensSpec(start=self.sink[0], count=self.sink[1]))
        return BlockSparseSpec(order=order, selector=UnionSpec(of=tuple(of)), far=MeanSpec(), kernel=self.kernel)

    def traits(self) -> Traits:
        inner = self._composition().traits()
        if inner.exact_at_init:
            return replace(inner, start=Start("exact", "tau null"))
        start = Start("training-free", "arXiv 2607.24027, with the first fifth of the steps and the first layer dense")
        return replace(inner, start=start)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(tau=0.5, block=6, order="morton"), site.at(extra=(Segment("text", 5),))),
            (cls(tau=0.3, block=8, moments="exact", band=0, sink=(20, 9)), site),
            (cls(block=4), site.at(grid=Grid(1, 4, 5), rope=None, qk_norm=False)),
            (cls(tau=None, block=8), site.at(grid=Grid(2, 3, 5), has_timestep=False)),
        ]
