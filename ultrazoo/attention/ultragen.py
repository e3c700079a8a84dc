"""UltraGen (arXiv 2510.18775): a local, a regional and a global branch, fused by diffusion time.

A named composition: it expands to `branched` (and, for the released code's outer layers, `full`). ``paper`` is the clean
design; ``released`` does what the released code does, so that its checkpoints give its results:

1. the first and last three layers keep full attention; 2. global keys start from the query projection; 3. LoRA has
biases and its second matrix is not zero; 4. the gates' order is [[local, regional], global]; 5. positions restart in each
window, compressed tokens sit at their index (the paper variant shares this); 6. norms and output projection are shared;
7. ragged sizes are resized; 8. windows are row-major, tokens t, h, w. Unlike it, any batch works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Cost, Rope, Site, Start, Traits, option
from .branched import BranchedAttention, BranchedSpec, BranchSpec
from .full import FullSpec
from .parts.adapt import LoraSpec
from .parts.compressors import DepthwiseConvSpec
from .parts.coords import CoordsSpec
from .parts.fuse import TimeGateSpec
from .parts.layouts import WindowsSpec
from .parts.shifts import RepartitionSpec


@dataclass(frozen=True, kw_only=True)
class UltraGenSpec(AttentionSpec):
    """K x K local windows, K/2 x K/2 windows of 2 x 2 cells, and all 4 x 4 cells of every frame."""

    name: ClassVar[str] = "ultragen"
    source: ClassVar[str] = "UltraGen, arXiv 2510.18775, sections 4.1-4.3; code sjtuplayer/UltraGen 4f9ec33"
    formula: ClassVar[str] = (
        "y = W_o (g1 y_global + (1 - g1) (g2 y_local + (1 - g2) y_regional)), g1, g2 gates of the time"
    )

    variant: Literal["paper", "released"] = option("paper", "the paper's design, or what the released code does")
    windows: int = option(4, "K: local windows along H and W; the regional branch has half as many", ge=2)
    factor: int = option(4, "cell of the global branch along H and W", ge=1)
    rank: int = option(64, "rank of the LoRAs", ge=1)
    full_first: int | None = option(None, "first layers with full attention; null: 0 in the paper, 3 released", ge=0)
    full_last: int | None = option(None, "last layers with full attention; null: 0 in the paper, 3 released", ge=0)

    def problems(self, site: Site) -> list[Problem]:
        if self.windows % 2:
            return [
                Problem("windows", f"the regional branch has half as many, got {self.windows}", "use an even number")
            ]
        return []

    def expand(self, site: Site) -> AttentionSpec:
        if self.problems(site):
            return self
        default = 3 if self.variant == "released" else 0
        first = default if self.full_first is None else self.full_first
        last = default if self.full_last is None else self.full_last
        if site.layer < first or site.layer >= site.layers - last:
            return FullSpec()
        return self._branched(rotary=site.rope is not None)

    def _branched(self, rotary: bool = True) -> BranchedSpec:
        released = self.variant == "released"
        ragged: Literal["exact", "resize"] = "resize" if released else "exact"
        start: Literal["zero", "random"] = "random" if released else "zero"
        # a backbone without rotary embedding has no use for coordinates
        local = CoordsSpec(origin="window") if rotary else CoordsSpec()
        window = CoordsSpec(origin="window", cell="index") if rotary else CoordsSpec()
        index = CoordsSpec(cell="index") if rotary else CoordsSpec()
        half = self.windows // 2
        return BranchedSpec(
            branches={
                "local": BranchSpec(
                    layout=WindowsSpec(counts=(self.windows, self.windows), ragged=ragged),
                    shift=RepartitionSpec(),
                    coords=local,
                ),
                "regional": BranchSpec(
                    compress=DepthwiseConvSpec(factor=2, ragged=ragged),
                    layout=WindowsSpec(counts=(half, half), ragged=ragged),
                    shift=RepartitionSpec(),
                    adapt=LoraSpec(rank=self.rank, bias=released, init=start),
                    coords=window,
                ),
                "global": BranchSpec(
                    compress=DepthwiseConvSpec(factor=self.factor, ragged=ragged),
                    adapt=LoraSpec(rank=self.rank, bias=released, init=start, key_from="query" if released else "key"),
                    coords=index,
                ),
            },
            fuse=TimeGateSpec(
                order=(("local", "regional"), "global") if released else ("global", ("local", "regional"))
            ),
        )

    def cost(self, site: Site) -> Cost:
        return self.expand(site).cost(site)

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        return self.expand(site).visible(site, queries)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray | None:
        return self.expand(site).reach(site, tokens)

    def visible_by_branch(self, site: Site, queries: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Influence through each branch alone; one branch named ``full`` where the layer keeps full attention."""
        expanded = self.expand(site)
        if isinstance(expanded, BranchedSpec):
            return expanded.visible_by_branch(site, queries)
        return {"full": expanded.visible(site, queries)[0]}

    def traits(self) -> Traits:
        inner = self._branched().traits()
        return Traits(
            start=Start("needs tuning", "UltraGen, arXiv 2510.18775: full fine-tuning, 50 epochs of 42 K clips"),
            needs=inner.needs,
            export=inner.export,
            key_valid=inner.key_valid,
            min_grid=inner.min_grid,
            notes=inner.notes,
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(2, 9, 11), rope=rope, qk_norm=True, layer=1, layers=3)
        # the released layout keeps layers full at both ends: ask for none in a model of three layers
        released = cls(variant="released", windows=2, rank=3, full_first=1, full_last=1)
        return [(cls(windows=2, rank=3), site), (released, site.at(grid=Grid(3, 9, 10)))]


UltraGenSpec.module = BranchedAttention
