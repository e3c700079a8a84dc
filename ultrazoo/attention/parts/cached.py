"""The selector around a selector that keeps its map over denoising steps: for so many, or until the data has moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import Problem
from ...spec import Site, option
from .around import AroundSpec
from .kept import KeptRows, kept_bytes
from .orders import Place
from .scene import Rows, Scene, checked
from .selectors import SelectorSpec

VOTES = (0.4, 0.8)
"""HASTE's gate of a layer."""
EVERY = 12
"""Denoising steps between two maps where a recipe says neither how many nor how far (DFSAttn)."""


@dataclass(frozen=True, kw_only=True)
class CachedSpec(AroundSpec):
    """The inner selector's map, made anew every few steps (DFSAttn, arXiv 2605.23445), or when queries and keys have moved
    (HASTE, arXiv 2605.14513), and used again in between.

    `drift`: a head asks for a new map where ``|q̄ - q̄_a|_1 + |k̄ - k̄_a|_1`` exceeds it, q̄ and k̄ being the means of its
    tokens and a the step of its last map. Where fewer than the first of `votes` of a layer's heads ask, none gets one, and
    all do where more than the second ask. Samples of a batch are counted apart.

    Kept in the call's state, one per selector, layer and guidance branch, as lists of visited blocks in the machine's memory
    (two bytes a visit, or bits where they are smaller); made anew as well where the grid, the extra tokens, the batch or a
    budget's share are others, or the step is an earlier one. Without state or step the map is made in each call.
    """

    name: ClassVar[str] = "cached"
    source: ClassVar[str] = "DFSAttn, arXiv 2605.23445; HASTE, arXiv 2605.14513, for drift and votes"
    minimal: ClassVar[Mapping[str, Any]] = {"of": {"name": "pooled"}, "every": 12}

    of: SelectorSpec = option(doc="the selector whose map is kept", kind="selector")
    every: int | None = option(
        None, "a new map at every so many-th denoising step; null: 12, or none where there is a drift", ge=1
    )
    drift: float | None = option(
        None, "how far a head's mean query and key may move before it asks for a new map (HASTE: 8 to 30)", ge=0
    )
    votes: tuple[float, float] | None = option(
        None,
        "shares of the heads that ask: below the first none gets a new map, above the second all; null: 0.4 and 0.8",
        ge=0,
        le=1,
    )

    @property
    def budgeted(self) -> bool:
        return self.of.budgeted

    @property
    def period(self) -> int | None:
        """Every so many-th denoising step gets a new map; None where drift alone decides."""
        return EVERY if self.every is None and self.drift is None else self.every

    @property
    def wanted(self) -> tuple[float, float]:
        """The shares of `votes`."""
        return VOTES if self.votes is None else self.votes

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.of.is_static:
            found.append(
                Problem("of", f"{self.of.name!r} is the same at every step: nothing is kept", "name it itself")
            )
        if self.votes is not None and self.drift is None:
            found.append(
                Problem("votes", "heads vote on their drift, and none is given", "give drift, or leave it out")
            )
        low, high = self.wanted
        if low > high:
            found.append(Problem("votes", f"none below {low:g}, and all above {high:g}", "give the smaller one first"))
        return found

    def kept_bytes(self, place: Place, site: Site) -> int:
        """Of the fullest map that its bounds allow, and of the means that it was made at."""
        everything = place.queries.tokens * place.keys.starts[place.selectable]
        rows = site.heads * place.queries.count
        visited = math.ceil(rows * place.selectable * self.bounds(place, site).most / max(1, everything))
        means = 0 if self.drift is None else 2 * 4 * site.inner
        return super().kept_bytes(place, site) + kept_bytes(rows, place.selectable, visited) + means

    def build(self, site: Site) -> nn.Module:
        return _Cached(self, self.of.build(site))


@dataclass
class _Kept:
    """Rows of a map, with what they were made for; `middle` (B, heads, 2 D) are the mean query and key of each head then."""

    made_for: Any
    step: int
    rows: dict[tuple[int, int], KeptRows]
    middle: Tensor | None


class _Cached(nn.Module):
    def __init__(self, spec: CachedSpec, inner: nn.Module):
        super().__init__()
        self.spec, self.of = spec, inner

    def forward(self, scene: Scene) -> Rows:
        fresh = checked(self.spec.of.name, self.of(scene), scene)
        if scene.state is None or scene.step is None:
            return fresh
        place, step, period = scene.place, scene.step[0], self.spec.period
        turn = None if period is None else step // period
        made_for = (
            turn,
            self.spec.of.phase(step),
            scene.keep,
            place.grid,
            place.queries,
            place.keys,
            place.selectable,
            scene.q.shape[:2],
        )
        # head groups and united selectors of one layer share its state: each keeps its own map
        key = ("selector", scene.layer, scene.branch, id(self))
        middle = None if self.spec.drift is None else _middle(scene)
        kept = scene.state.get(key)
        if kept is None or kept.made_for != made_for or step < kept.step:
            kept = scene.state[key] = _Kept(made_for, step, {}, middle)
        elif middle is not None:
            self._renew(kept, middle, fresh)
        kept.step = step
        held: _Kept = kept

        def rows(lo: int, hi: int) -> Tensor:
            if (lo, hi) not in held.rows:
                held.rows[(lo, hi)] = KeptRows.of(fresh(lo, hi))
            return held.rows[(lo, hi)].rows(scene.q.device)

        return rows

    def _renew(self, kept: _Kept, middle: Tensor, fresh: Rows) -> None:
        """New rows for the heads that get them; scores are made for all heads of the layer."""
        assert kept.middle is not None
        assert self.spec.drift is not None
        asks = (middle - kept.middle).abs().sum(-1) > self.spec.drift  # (B, heads)
        share, (low, high) = asks.double().mean(1, keepdim=True), self.spec.wanted
        renewed = (asks & (share >= low)) | (share > high)
        if not bool(renewed.any()):
            return
        for (lo, hi), rows in kept.rows.items():
            kept.rows[(lo, hi)] = KeptRows.of(
                torch.where(renewed[..., None, None], fresh(lo, hi), rows.rows(middle.device))
            )
        kept.middle = torch.where(renewed[..., None], middle, kept.middle)


def _middle(scene: Scene) -> Tensor:
    """Means of the valid queries and keys of each head: (B, heads, 2 D), fp32 or wider."""
    found = []
    for z, valid in ((scene.q, scene.query_valid), (scene.k, scene.key_valid)):
        wide = z.detach().to(torch.promote_types(z.dtype, torch.float32))
        if valid is None:
            found.append(wide.mean(2))
            continue
        some = valid[:, None, :, None].to(wide.dtype)
        found.append((wide * some).sum(2) / some.sum(2).clamp(min=1))
    return torch.cat(found, dim=-1)
