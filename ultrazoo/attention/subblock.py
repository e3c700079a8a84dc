"""SubBlock (SGLang #34148, #34680, #35850): blocks ranked by an estimate of their softmax mass from means of short runs.

``score_ij = log sum_{a, c} exp(s q̄_ia k̄_jc)`` over runs a of query block i and c of key block j, in fp32; the best
``1 - sparsity`` of the key blocks, up to a multiple of 8, get an exact softmax, the rest nothing. A named composition of
`block_sparse`. Of extra tokens the keys compete, and only rows of videos are sparse (#35850): those of a segment with a grid
of more than one frame follow the pattern, the others see everything. Blocks of ours never cross segments, so no block is mixed. The published dense first 10 of 50 steps are a recipe's
`steps`; its rule that short sequences stay dense is left to the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .parts.orders import RasterSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec


@dataclass(frozen=True, kw_only=True)
class SubblockSpec(AttentionSpec):
    """Top-k blocks by the log-sum-exp of scores among runs of tokens."""

    name: ClassVar[str] = "subblock"
    source: ClassVar[str] = "SGLang pull requests 34148, 34680 and 35850"
    formula: ClassVar[str] = (
        "y_i = W_o sum_{j in M(i)} softmax(q_i k_j / sqrt(D)) v_j, M = topk(log sum_{a,c} exp(s qc_ia kc_jc))"
    )

    sparsity: float = option(0.75, "share of the key blocks that a query block does not visit", ge=0, lt=1)
    runs: tuple[int, int] = option((4, 4), "runs that a query block and a key block are cut into", ge=1)
    block: int = option(64, "tokens per block", ge=1)
    multiple: int = option(8, "the number of blocks kept is rounded up to a multiple of this", ge=1)
    extra_keys: Literal["host", "always", "compete"] = option(
        "compete", "keys of extra tokens: chosen like others, or seen by all; host: as their segment says"
    )
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def problems(self, site: Site) -> list[Problem]:
        found = []
        if any(self.block % run for run in self.runs):
            legal = [n for n in range(1, self.block + 1) if self.block % n == 0]
            rule = f"runs {list(self.runs)} do not divide a block of {self.block} tokens"
            found.append(Problem("runs", rule, f"each one of {', '.join(map(str, legal))}"))
        return found

    def expand(self, site: Site) -> AttentionSpec:
        return self if self.problems(site) else self._composition()

    def _composition(self) -> BlockSparseSpec:
        rule = TopKSpec(share=round(1 - self.sparsity, 12), multiple=self.multiple, short="all")
        selector = PooledSpec(rule=rule, runs=self.runs)
        return BlockSparseSpec(
            order=RasterSpec(block=self.block),
            selector=selector,
            extra_rows="videos",
            extra_keys=self.extra_keys,
            kernel=self.kernel,
        )

    def traits(self) -> Traits:
        inner = self._composition().traits()
        if inner.exact_at_init:
            return replace(inner, start=Start("exact", "sparsity 0"))
        return replace(inner, start=Start("training-free", "SGLang #34148, with the first 10 of 50 steps dense"))

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        reference = Segment("reference", 12, grid=Grid(2, 2, 3))
        packed = (Segment("text", 5), reference)
        return [
            (cls(block=8, multiple=2), site.at(extra=packed)),
            (cls(block=6, runs=(1, 3), sparsity=0.6, multiple=1), site.at(grid=Grid(1, 6, 7), rope=None)),
            (cls(block=8, runs=(2, 2), sparsity=0.0), site.at(grid=Grid(2, 3, 5), has_timestep=False)),
            (cls(block=6, runs=(2, 2), multiple=2, extra_keys="always"), site.at(extra=(Segment("text", 9),))),
        ]
