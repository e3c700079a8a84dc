"""Block maps: which blocks of keys each block of queries sees. Rows of `visible`, pooled over blocks of the grid.

A block is ``t x h x w`` tokens, blocks in raster order. Where all rows would be too many, each block of queries is looked
at through a few of its queries, evenly spread, and the map says how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cost.units import count, percent
from ..errors import UsageError
from ..grid import Grid
from ..spec import AttentionSpec, Site
from .follow import CHUNK
from .influence import ALL, asking

MOST_BLOCKS = 64
"""Blocks of a side of a map whose block size nobody chose."""

MOST_CHOSEN = 512
"""Blocks of a side where the block size is given."""

ANSWERS = 300_000_000
"""Answers of `visible`, one per head or branch, query and token, that the maps of one layer may ask for."""


@dataclass(frozen=True)
class BlockMap:
    """`share` (blocks, blocks): of the pairs of a query and a token of two blocks, how many the query may depend on.

    `block`: tokens of a block along T, H and W (the last ones may be shorter); `counts`: blocks along them. `looked_at` of
    the `of` queries of a whole block were asked. `visits`, where the data choose: of all pairs of tokens, the share that is
    computed, fewest, expected and most, as the plan prices it; None where the map is what is computed.
    """

    block: tuple[int, int, int]
    counts: tuple[int, int, int]
    share: np.ndarray
    looked_at: int
    of: int
    visits: tuple[float, float, float] | None = None

    @property
    def blocks(self) -> int:
        return len(self.share)

    @property
    def exact(self) -> bool:
        return self.looked_at == self.of

    @property
    def seen(self) -> float:
        """Share of pairs of blocks in which any pair of tokens was seen."""
        return float((self.share > 0).mean())

    @property
    def seen_text(self) -> str:
        """``37 % of block pairs``, with ``at least`` where some queries were left out and may see more."""
        least = "" if self.exact or self.seen == 1 else "at least "
        return f"{least}{percent(self.seen)} of block pairs"

    def title(self) -> str:
        """``63 blocks of 3x46x80 tokens, 2 of 11 040 queries of each looked at``."""
        sizes = "x".join(map(str, self.block))
        looked = "every query" if self.exact else f"{count(self.looked_at)} of {count(self.of)} queries of each"
        title = f"{self.blocks} block{'s' * (self.blocks != 1)} of {sizes} tokens, {looked} looked at"
        if self.visits is None:
            return title
        least, expected, most = map(percent, self.visits)
        return f"{title}; inside it the data choose, about {expected} of all pairs ({least} to {most})"

    def data(self) -> dict[str, Any]:
        """The map as plain data, shares to four digits. `seen` of pairs of blocks is exact or, from few queries, a lower
        bound."""
        return {
            "block": list(self.block),
            "counts": list(self.counts),
            "queries_looked_at": self.looked_at,
            "queries_of_a_block": self.of,
            "seen": self.seen,
            "seen_bound": "exact" if self.exact or self.seen == 1 else "lower bound",
            "visits": None
            if self.visits is None
            else dict(zip(("least", "expected", "most"), self.visits, strict=True)),
            "share": [[round(float(value), 4) for value in row] for row in self.share],
        }


def default_block(grid: Grid, most: int = MOST_BLOCKS) -> tuple[int, int, int]:
    """Tokens of a block such that there are `most` blocks at most: up to eight spans of frames, the rest in the plane."""
    t, h, w = grid
    spans = min(t, 8 if most >= 32 else 3)
    long = -(-t // spans)
    in_plane = most // -(-t // long)
    # windows in a row of the plane go along its longer side
    across = max(1, min(w, round((in_plane * w / h) ** 0.5)))
    down = max(1, min(h, in_plane // across))
    across = max(1, min(w, in_plane // down))
    return (long, -(-h // down), -(-w // across))


def parse_block(text: str, grid: Grid) -> tuple[int, int, int]:
    """A block from ``t,h,w``; raises UsageError where it is none, or too small for a map that can be looked at."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) < 1:
        raise UsageError(f"a block is t,h,w (whole numbers of tokens, at least 1), got {text!r}")
    block = tuple(min(number, side) for number, side in zip(numbers, grid, strict=True))
    blocks = int(np.prod([-(-side // size) for side, size in zip(grid, block, strict=True)]))
    if blocks > MOST_CHOSEN:
        raise UsageError(
            f"blocks of {text} tokens make a map of {blocks} x {blocks} on grid {grid}, {MOST_CHOSEN} x {MOST_CHOSEN} is "
            f"the most; larger blocks are needed, for example {','.join(map(str, default_block(grid)))}"
        )
    return (block[0], block[1], block[2])


def block_maps(
    spec: AttentionSpec, site: Site, block: tuple[int, int, int] | None = None, answers: int = ANSWERS
) -> dict[str, BlockMap]:
    """Maps of one layer by name: one per branch where `spec` has branches, last that of all of it.

    Raises Silent, with the name of the attention, where `spec` fails to answer.
    """
    grid = site.grid
    block = block or default_block(grid)
    starts = [np.arange(0, side, size) for side, size in zip(grid, block, strict=True)]
    counts = (len(starts[0]), len(starts[1]), len(starts[2]))
    blocks, whole = counts[0] * counts[1] * counts[2], block[0] * block[1] * block[2]
    rows = sum(len(seen) for seen in _asked(spec, site, [0]).values())
    most = max(1, answers // (grid.tokens * rows * blocks))
    owner, queries = _queries(grid, block, counts, most)
    sizes = _pooled(np.ones((1, grid.tokens), dtype=bool), grid, starts)[0]
    shares: dict[str, np.ndarray] = {}
    step = max(1, CHUNK // (grid.tokens * rows))
    for low in range(0, len(queries), step):
        for name, seen in _asked(spec, site, queries[low : low + step].tolist()).items():
            share = shares.setdefault(name, np.zeros((blocks, blocks)))
            np.add.at(share, owner[low : low + step], _pooled(seen.any(axis=0), grid, starts) / sizes)
    looked_at = np.bincount(owner, minlength=blocks)[:, None]
    visits = {ALL: _visits(spec, site)}
    return {
        name: BlockMap(block, counts, share / looked_at, min(most, whole), whole, visits.get(name))
        for name, share in shares.items()
    }


def _visits(spec: AttentionSpec, site: Site) -> tuple[float, float, float] | None:
    """Shares of all pairs that are computed, where the data choose them."""
    cost = spec.cost(site)
    if cost.pairs_min is None or cost.pairs_max is None or cost.pairs_min == cost.pairs_max:
        return None
    everything = (site.tokens + site.extra_tokens) ** 2
    return cost.pairs_min / everything, cost.pairs / everything, cost.pairs_max / everything


def _asked(spec: AttentionSpec, site: Site, queries: list[int]) -> dict[str, np.ndarray]:
    """Rows (heads or 1, queries, N) by branch, and of all together."""
    by_branch = getattr(spec, "visible_by_branch", None)
    parts = {} if by_branch is None else asking(spec, "visible_by_branch", lambda: by_branch(site, queries))
    whole = asking(spec, "visible", lambda: spec.visible(site, queries))
    shape = (-1, len(queries), site.tokens)
    return {name: np.asarray(seen, dtype=bool).reshape(shape) for name, seen in [*dict(parts).items(), (ALL, whole)]}


def _pooled(rows: np.ndarray, grid: Grid, starts: list[np.ndarray]) -> np.ndarray:
    """(queries, N) → (queries, blocks): how many tokens of each block."""
    values = rows.reshape(-1, *grid)
    # the longest axis first: what is left is small
    for axis in (3, 2, 1):
        values = np.add.reduceat(values, starts[axis - 1], axis=axis, dtype=np.int32)
    return values.reshape(len(rows), -1)


def _queries(
    grid: Grid, block: tuple[int, int, int], counts: tuple[int, int, int], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """(block of each query, its number): up to `most` queries of every block, evenly spread over it."""
    owner, queries = [], []
    for number in range(counts[0] * counts[1] * counts[2]):
        place = np.unravel_index(number, counts)
        sides = [
            np.arange(k * size, min((k + 1) * size, side)) for k, size, side in zip(place, block, grid, strict=True)
        ]
        flat = ((sides[0][:, None, None] * grid.h + sides[1][:, None]) * grid.w + sides[2]).reshape(-1)
        kept = min(most, len(flat))
        # the middle of each of as many equal runs
        picked = flat[(2 * np.arange(kept) + 1) * len(flat) // (2 * kept)]
        owner.append(np.full(kept, number))
        queries.append(picked)
    return np.concatenate(owner), np.concatenate(queries)
