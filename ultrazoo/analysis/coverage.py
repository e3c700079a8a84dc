"""Coverage: after how many layers every token can have influenced every other, and which pairs never meet.

What the model's output at a query may depend on is followed back from the last layer: what the last attention lets the
query see, then what the layer before lets those tokens see, and so on. A residual keeps every token its own. The count of
layers is thus counted back from the output. Text, time and other conditions do not carry one grid token to another; extra
tokens do, and are told apart from the grid.

How exact an answer is, it says itself:

- ``all``: every query of the grid was followed (grids of up to `ALL_TOKENS`).
- ``sampled``: corners, middle and other queries, each followed exactly on the grid itself. Designs with a `reach` of their
  own can be followed so at any size, others while the rows of `visible` that this takes stay within a budget.
- ``shrunken``: beyond the budget, on a smaller grid of the same proportions: an estimate, for windows that are given in
  tokens do not shrink with the grid.

The budget counts answers of `visible`, not seconds, so that the same plan gives the same answer everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..cost.units import count, percent
from ..grid import Grid
from ..spec import AttentionSpec, Site
from .follow import Follow, Token, TooMuch, moved, samples, smaller_grids
from .influence import Silent, bound

ALL_TOKENS = 1024
"""Every query is followed on grids of up to so many tokens."""

BUDGET = 300_000_000
"""Answers of `visible`, one per head, query and token, that may be asked for on one grid."""


@dataclass(frozen=True)
class Coverage:
    """What was found, on `grid`, from `queries` queries.

    `layers`: last layers after which every token followed can depend on every token; None: not after all of them.
    `reached[k]`: share of the grid that the query with the least can depend on through the last k + 1 layers.
    `apart`: pairs (query, token) of those followed that never meet, of `pairs`; `example` is one of them. `bound` is
    ``upper bound`` where a design of the layers followed says what a query may depend on, not what it does; `selects` where
    the data choose inside that. `unknown` says why there is no answer.
    """

    grid: Grid
    model_grid: Grid
    how: Literal["all", "sampled", "shrunken", ""]
    queries: int = 0
    depth: int = 0
    layers: int | None = None
    reached: tuple[float, ...] = ()
    apart: int = 0
    pairs: int = 0
    example: tuple[Token, Token] | None = None
    bound: str = "exact"
    extra: bool = False
    selects: bool = False
    unknown: str = ""

    @property
    def exact(self) -> bool:
        """Whether the answer is that of the grid itself, for every pair of tokens."""
        return self.how == "all" and self.bound == "exact"

    @property
    def apart_share(self) -> float | None:
        """Of all pairs; None where only some queries were followed, most of them corners, which see the least."""
        if self.queries < self.grid.tokens:
            return None
        return self.apart / self.pairs if self.pairs else 0.0

    def short(self) -> str:
        """``2``, ``≥2``, ``≈3``, ``never (75 % apart)`` or ``never (some apart)``: one cell of a table."""
        if self.unknown:
            return "unknown"
        mark = "≈" if self.how == "shrunken" else "≥" if self.selects else ""
        if self.layers is not None:
            return f"{mark}{self.layers}"
        return f"{mark if mark == '≈' else ''}never ({self._apart()} apart)"

    def _apart(self) -> str:
        return "some" if self.apart_share is None else percent(self.apart_share)

    def text(self) -> str:
        """The answer in sentences, with how it was found."""
        if self.unknown:
            return f"coverage: unknown: {self.unknown}"
        lines = [f"coverage: {self._answer()} ({self._found()})"]
        if self.layers is None:
            (query, token) = self.example or ((0, 0, 0), (0, 0, 0))
            pairs = f"{count(self.apart)} of {count(self.pairs)} pairs ({self._apart()})"
            if self.apart_share is None:
                pairs = "some pairs, how many is not known"
            lines.append(f"  never meet: {pairs}; for example {query} does not depend on {token}")
        if len(self.reached) > 1 or self.layers is None:
            shares = ", ".join(percent(share) for share in self.reached[:8])
            more = ", …" if len(self.reached) > 8 else ""
            lines.append(f"  reached by the query with the least, layer by layer from the last: {shares}{more}")
        if self.selects:
            lines.append("  the data select inside what is counted here: fewer pairs may meet, and later")
        elif self.bound != "exact":
            lines.append("  for some data a pair may weigh nothing")
        if self.extra:
            lines.append("  extra tokens see everything and are seen by all: through them two layers are enough")
        return "\n".join(lines)

    def _answer(self) -> str:
        about = "about " if self.how == "shrunken" else ""
        if self.layers is None:
            return f"after all {self.depth} layers some tokens cannot have influenced each other"
        least = "at least " if self.selects else ""
        plural = "s" if self.layers != 1 else ""
        return f"after {about}{least}{self.layers} layer{plural} every token can have influenced every other"

    def _found(self) -> str:
        if self.how == "all":
            return (
                f"exact, from all {count(self.queries)} tokens of the grid"
                if self.bound == "exact"
                else (f"from all {count(self.queries)} tokens of the grid")
            )
        if self.how == "sampled":
            return f"from {self.queries} sampled queries, followed exactly on grid {self.grid}"
        return (
            f"an estimate from {self.queries} queries on the shrunken grid {self.grid}; windows given in tokens do not "
            "shrink with it"
        )

    def data(self) -> dict[str, Any]:
        """The same as plain data; pairs that never meet are of the queries followed, their share of all pairs or None."""
        return {
            "layers": self.layers,
            "of": self.depth,
            "found": self.how,
            "grid": list(self.grid),
            "queries": self.queries,
            "bound": self.bound,
            "selects": self.selects,
            "reached": list(self.reached),
            "never_meet": {
                "pairs": self.apart,
                "of": self.pairs,
                "share": self.apart_share,
                "example": [list(token) for token in self.example] if self.example else None,
            },
            "through_extra_tokens": self.extra,
            "unknown": self.unknown,
        }


def coverage(
    sites: Sequence[Site],
    attention: Sequence[AttentionSpec],
    written: Sequence[AttentionSpec] = (),
    budget: int = BUDGET,
) -> Coverage:
    """Follow queries back through `attention[i]` at `sites[i]`; `written` are the specs before expansion.

    A design that does not answer, or that no smaller grid suits, gives an answer with `unknown` set: nothing is raised.
    """
    if not sites:
        return Coverage(Grid(1, 1, 1), Grid(1, 1, 1), "", unknown="there are no layers")
    grid = sites[0].grid
    try:
        return _answer(sites, attention, written or attention, budget)
    except Silent as error:
        return Coverage(grid, grid, "", depth=len(sites), unknown=str(error))


def _answer(
    sites: Sequence[Site], attention: Sequence[AttentionSpec], written: Sequence[AttentionSpec], budget: int
) -> Coverage:
    grid = sites[0].grid
    if grid.tokens <= ALL_TOKENS:
        return _followed(sites, attention, "all", grid, None)
    try:
        return _followed(sites, attention, "sampled", grid, budget)
    except TooMuch:
        why = "too much to follow, and no smaller grid was found"
    for smaller in smaller_grids(grid):
        made = moved(sites, written, smaller)
        if isinstance(made, str):
            why = f"too much to follow, and no smaller grid suits the design: {made}"
            continue
        try:
            return _followed(*made, "shrunken", grid, budget)
        except TooMuch:
            continue
    return Coverage(grid, grid, "", depth=len(sites), unknown=why)


def _followed(
    sites: Sequence[Site],
    attention: Sequence[AttentionSpec],
    how: Literal["all", "sampled", "shrunken"],
    model_grid: Grid,
    budget: int | None,
) -> Coverage:
    grid = sites[0].grid
    queries = np.arange(grid.tokens) if grid.tokens <= ALL_TOKENS else samples(grid)
    follow = Follow(queries, grid.tokens, budget)
    shares = []
    for site, spec in zip(reversed(sites), reversed(attention), strict=True):
        follow.back(site, spec)
        counts = follow.counts
        shares.append(int(counts.min()) / grid.tokens)
        if shares[-1] == 1:
            break
    apart = len(queries) * grid.tokens - int(counts.sum())
    bounds = [bound(spec) for spec in attention[len(attention) - len(shares) :]]
    extra = [_carries(site) for site in sites[-2:]]
    return Coverage(
        grid=grid,
        model_grid=model_grid,
        how=how,
        queries=len(queries),
        depth=len(sites),
        layers=None if apart else len(shares),
        reached=tuple(shares),
        apart=apart,
        pairs=len(queries) * grid.tokens,
        example=follow.example(grid) if apart else None,
        bound="exact" if all(one == "exact" for one, _ in bounds) else "upper bound",
        selects=any(chosen for _, chosen in bounds),
        extra=len(extra) == 2 and all(extra),
    )


def _carries(site: Site) -> bool:
    """Whether extra tokens see the whole grid and are seen by all of it."""
    return any(one.length > 0 and one.rows == "dense" and one.keys == "always" for one in site.extra)
