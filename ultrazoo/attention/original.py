"""The host's own attention, untouched. A backbone whose layer keeps `original` is not changed there at all.

Native backbones have full softmax attention, so there it is `full`; adapters over other libraries skip the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..grid import Grid
from ..ports import EXPORTS
from ..spec import AttentionSpec, Cost, Rope, Site, Start, Traits
from .full import FullAttention, dense_cost


@dataclass(frozen=True, kw_only=True)
class OriginalSpec(AttentionSpec):
    """Leaves the layer as the host made it; priced as the full attention that native hosts have."""

    name: ClassVar[str] = "original"
    source: ClassVar[str] = "the host"
    formula: ClassVar[str] = "y = W_o softmax(Q K^T / sqrt(D)) V on hosts with softmax attention, else the host's own"

    @property
    def kernel(self) -> str:
        return "auto"

    def cost(self, site: Site) -> Cost:
        return dense_cost(site)

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def traits(self) -> Traits:
        return Traits(
            start=Start("exact", "nothing is changed"), exact_at_init=True, export=EXPORTS, min_grid=(1, 1, 1)
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(2, 4, 2), pairing="halves")
        return [(cls(), Site(dim=24, heads=3, head_dim=8, grid=Grid(2, 3, 5), rope=rope))]


OriginalSpec.module = FullAttention
