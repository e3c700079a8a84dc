"""Full attention whose softmax skips tiles of keys that could not matter (BLASST, arXiv 2512.12087). Lossy, training-free.

The scores of every pair are computed; softmax and the values of skipped tiles are not, so less than half of the work is saved.
``threshold = scale_factor / keys`` when a factor is given, as calibrated checkpoints do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Problem
from ..grid import Grid
from ..kernels import attend
from ..kernels.skip_softmax import SCORE_BYTES, TILE
from ..ops.graphs import outside_graphs
from ..spec import AttentionSpec, Cost, Rope, Site, Start, Traits, option
from .contract import Attention, Call, Host, grid_positions, refuse_segments
from .full import dense_cost
from .grouped import attend_extra


@dataclass(frozen=True, kw_only=True)
class SkipSoftmaxAttentionSpec(AttentionSpec):
    """Every pair is scored; tiles of 128 x 128 whose weights all stay below a threshold are left out."""

    name: ClassVar[str] = "skip_softmax"
    source: ClassVar[str] = "BLASST, arXiv 2512.12087"
    formula: ClassVar[str] = (
        "tile j of row block i is dropped iff exp(max_j s q k - running max) < threshold for every row"
    )

    threshold: float | None = option(
        None,
        "weight below which a tile is skipped, 0 skips nothing; null: 0.001 where there is no scale_factor",
        ge=0,
        lt=1,
    )
    scale_factor: float | None = option(
        None, "threshold times keys, instead of a threshold; the source: 2822.62 exp(4.388 sparsity) for Wan 2.2", ge=0
    )

    def value(self, keys: int) -> float:
        """The threshold against so many keys."""
        if self.scale_factor is not None:
            return self.scale_factor / keys
        return 0.001 if self.threshold is None else self.threshold

    def problems(self, site: Site) -> list[Problem]:
        if self.threshold is not None and self.scale_factor is not None:
            return [Problem("scale_factor", "threshold is given as well", "give one of them")]
        value = self.value(site.tokens + site.extra_tokens)
        if value >= 1:
            rule = f"gives a threshold of {value:.3g} at {site.tokens} tokens, which would skip every tile that is not the best"
            return [Problem("scale_factor", rule, f"less than {site.tokens}")]
        return []

    def cost(self, site: Site) -> Cost:
        """Of full attention: what is skipped is known when it runs, and is less than half, as every pair is scored."""
        cost = dense_cost(site)
        # scores, their exponentials and what is kept of them, in fp32, which counts twice beside a 16-bit stream
        held = 8 * min(SCORE_BYTES // 4, site.heads * site.tokens * TILE)
        peak = cost.peak_elements + held
        return replace(cost, pairs_min=cost.pairs // 2, pairs_max=cost.pairs, peak_elements=peak)

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def traits(self) -> Traits:
        exact = self.threshold == 0 or self.scale_factor == 0
        start = Start("training-free", "arXiv 2512.12087: dense while t > 0.93, first blocks left out")
        return Traits(
            start=Start("exact", "nothing is skipped") if exact else start,
            exact_at_init=exact,
            export=(),
            visible="upper bound",
            min_grid=(1, 1, 1),
            selects=True,
            fullgraph=False,
            notes="which tiles are skipped depends on the data",
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(threshold=0.4), site.at(grid=Grid(5, 8, 9))),
            (cls(threshold=0.0), site.at(grid=Grid(1, 4, 5), rope=None)),
        ]


class SkipSoftmaxAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D). Extra keys stand behind the grid's."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        keys, values, valid = k, v, call.key_valid
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
            keys, values = torch.cat([k, call.extra.k], dim=1), torch.cat([v, call.extra.v], dim=1)
            valid = _joined(x, call)
        mask = None if valid is None else valid[:, None, None]
        out = host.out(_skipping(q, keys, values, mask, spec.value(keys.shape[1])).flatten(2))
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, k, v, call.key_valid, "auto")


SkipSoftmaxAttentionSpec.module = SkipSoftmaxAttention


# what is skipped is data: a compiler goes around it
@outside_graphs
def _skipping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, threshold: float) -> Tensor:
    """(B, N, heads, D) against (B, keys, heads, D)."""
    found = attend(*(z.transpose(1, 2) for z in (q, k, v)), key_mask=mask, kernel="skip_softmax", threshold=threshold)
    assert isinstance(found, Tensor)
    return found.transpose(1, 2)


def _joined(x: Tensor, call: Call) -> Tensor | None:
    """Bool (B, N + M): which keys count; None where all do."""
    assert call.extra is not None
    if call.key_valid is None and call.extra.key_mask is None:
        return None
    grid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if call.key_valid is None else call.key_valid
    mask = call.extra.key_mask
    more = torch.ones(call.extra.k.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    return torch.cat([grid, more], dim=1)
