"""What tokens can depend on, followed back through layers: sets of tokens, budgets, smaller grids.

Rows come from `AttentionSpec.visible`, sets from `AttentionSpec.reach` where a design has a closed form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from ..grid import Grid
from ..spec import AttentionSpec, Site
from .influence import asking

SAMPLES = 12
"""Queries followed on larger grids."""

SHRUNKEN = (8_000, 3_000, 1_000)
"""Tokens of the smaller grids that are tried where the budget does not hold the grid itself."""

CHUNK = 6_000_000
"""Answers asked for at a time: what the rows take in bytes."""

HOPE = 60_000_000
"""Answers asked for where the budget does not hold all that may be needed: a few rows may be enough."""

COLUMNS = 65_536
"""Columns of rows put together at a time."""

FEW = 64
"""Up to so many tokens are asked for their rows, even where a design has a `reach` of its own."""

PROBES = 4
"""Rows by which layers are told apart where not every query is followed."""

KINDS = 4
"""Kinds of layers remembered at a time."""

GOLDEN = 0.6180339887498949
"""The golden ratio scatters without lining up with windows of any size."""

Token = tuple[int, int, int]


class TooMuch(Exception):
    """The budget does not hold what is left to ask."""


def samples(grid: Grid, wanted: int = SAMPLES) -> np.ndarray:
    """Corners, middle and scattered tokens of a grid, `wanted` or all of a smaller one: flat numbers, sorted."""
    t, h, w = grid
    corners = {(a * h + b) * w + c for a in (0, t - 1) for b in (0, h - 1) for c in (0, w - 1)}
    middle = ((t // 2) * h + h // 2) * w + w // 2
    found = list(dict.fromkeys([*sorted(corners), middle]))
    for step in range(1, grid.tokens):
        if len(found) >= min(wanted, grid.tokens):
            break
        place = int(grid.tokens * ((step * GOLDEN) % 1.0))
        if place not in found:
            found.append(place)
    return np.array(sorted(found))


class Follow:
    """What each query can depend on, one layer further back at a time: `sets` is bool (queries, N).

    `budget` bounds the answers of `visible` that are asked for; None: no bound.
    """

    def __init__(self, queries: np.ndarray, tokens: int, budget: int | None):
        self.queries, self.tokens, self.left = queries, tokens, budget
        self.sets = np.zeros((len(queries), tokens), dtype=bool)
        self.sets[np.arange(len(queries)), queries] = True
        self.kinds: dict[tuple[str, bytes], np.ndarray] = {}

    @property
    def counts(self) -> np.ndarray:
        """Tokens reached, (queries,)."""
        return np.count_nonzero(self.sets, axis=1)

    def back(self, site: Site, spec: AttentionSpec) -> None:
        """One layer further from the output: each set becomes the union of what its tokens see."""
        at = np.flatnonzero(self.counts < self.tokens)
        if not len(at):
            return
        spent = self._spent(site, spec)
        todo = self.sets[at] & ~spent[at]
        asked = np.flatnonzero(todo.any(axis=0))
        if not len(asked):
            return
        spent[at] |= todo
        found = None
        if len(asked) > FEW:
            found = asking(spec, "reach", lambda: spec.reach(site, todo))
        if found is None:
            self._by_rows(site, spec, at, todo, asked)
        else:
            self.sets[at] |= found

    def _spent(self, site: Site, spec: AttentionSpec) -> np.ndarray:
        """What has been asked of layers like this one: those whose spec is equal and whose rows are, every row where every
        query is followed and those of a few queries elsewhere."""
        state = hashlib.blake2b(digest_size=16)
        probes = self.queries if len(self.queries) == self.tokens else self.queries[:: len(self.queries) // PROBES or 1]
        for _, rows in self._rows(site, spec, probes):
            state.update(np.packbits(rows).tobytes())
        key = (repr(spec), state.digest())
        found = self.kinds.pop(key, None)
        if found is None:
            found = np.zeros(self.sets.shape, dtype=bool)
            if len(self.kinds) >= KINDS:
                self.kinds.pop(next(iter(self.kinds)))
        self.kinds[key] = found
        return found

    def _by_rows(self, site: Site, spec: AttentionSpec, at: np.ndarray, todo: np.ndarray, asked: np.ndarray) -> None:
        # far apart first: where everything is reached, a few rows show it
        order = asked[np.argsort((np.arange(len(asked)) * GOLDEN) % 1.0, kind="stable")]
        most = len(asked) * self.tokens
        if self.left is not None and most > self.left:
            self.left = min(self.left, HOPE)
        for tokens, rows in self._rows(site, spec, order):
            of = todo[:, tokens].astype(np.float32)
            for low in range(0, self.tokens, COLUMNS):
                part = rows[:, low : low + COLUMNS].astype(np.float32)
                self.sets[at, low : low + COLUMNS] |= of @ part > 0
            if self.sets[at].all():
                return

    def _rows(self, site: Site, spec: AttentionSpec, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, their rows) in pieces; a row says what the output at a token may depend on, itself included."""
        step = max(1, CHUNK // self.tokens)
        low = 0
        while low < len(tokens):
            some = tokens[low : low + step]
            seen = asking(spec, "visible", lambda some=some: spec.visible(site, some.tolist()))
            if self.left is not None:
                self.left -= seen.size
                if self.left < 0:
                    raise TooMuch
            # where heads differ, the next piece is smaller
            low, step = low + step, max(1, CHUNK // (self.tokens * len(seen)))
            rows = seen.any(axis=0)
            rows[np.arange(len(some)), some] = True
            yield some, rows

    def example(self, grid: Grid) -> tuple[Token, Token]:
        """A query, and the nearest token that it never depends on."""
        s = int(np.argmin(self.counts))
        query = np.array(np.unravel_index(int(self.queries[s]), grid))
        missing = np.stack(np.unravel_index(np.flatnonzero(~self.sets[s]), grid), axis=1)
        nearest = missing[np.abs(missing - query).sum(axis=1).argmin()]
        return _token(query), _token(nearest)


def _token(place: np.ndarray) -> Token:
    t, y, x = (int(number) for number in place)
    return t, y, x


def smaller_grids(grid: Grid) -> Iterator[Grid]:
    """Grids of nearly the same proportions and fewer tokens, larger ones first; sides that are multiples of more come
    after those of less, for designs that need them."""
    given: set[Grid] = set()
    for tokens in SHRUNKEN:
        if tokens >= grid.tokens:
            continue
        long = [axis for axis in range(3) if grid[axis] > 1]
        scale = (tokens / grid.tokens) ** (1 / len(long))
        for multiple in (1, 2, 4, 8, 16):
            sides = []
            for axis, length in enumerate(grid):
                unit = multiple if axis > 0 else 1
                side = max(1, round(length * scale / unit)) * unit
                sides.append(min(side, length))
            made = Grid(*sides)
            if made not in given and made.tokens < grid.tokens:
                given.add(made)
                yield made


def moved(
    sites: Sequence[Site], specs: Sequence[AttentionSpec], grid: Grid
) -> tuple[list[Site], list[AttentionSpec]] | str:
    """The same layers at another grid, compositions expanded there; or the first problem."""
    moved, expanded = [], []
    for site, spec in zip(sites, specs, strict=True):
        now = site.at(grid=grid)
        one = spec
        for _ in range(2):
            found = asking(spec, "problems", lambda one=one, now=now: one.problems(now))
            if found:
                return f"{spec.name} at grid {grid}: {found[0].rule}"
            one = asking(spec, "expand", lambda one=one, now=now: one.expand(now))
        moved.append(now)
        expanded.append(one)
    return moved, expanded
