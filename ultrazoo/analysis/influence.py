"""Who can influence a query: one token's view of the grid, per branch, with layers of the same view put together.

The view is `AttentionSpec.visible`: possible dependence of an output on an input, through compression and lift. One
query at a time is asked for, so that a 4K grid costs one boolean per token and branch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cost.units import layer_list
from ..errors import UltrazooError, UsageError
from ..grid import Grid
from ..registry import cause
from ..spec import AttentionSpec, Site

ALL = "all"
"""Name of the view of a whole attention, all branches and heads together."""


MOST_HEADS = 6
"""Head groups that see differently and are shown one by one; more are shown together only."""


class Silent(UltrazooError):
    """A design that fails to answer; the message names it."""


def asking(spec: AttentionSpec, what: str, question: Callable[[], Any]) -> Any:
    """The answer of a spec's own code; raises Silent, which names the design, where that code fails."""
    try:
        return question()
    except Exception as error:  # a plugin may raise anything
        raise Silent(f"attention {spec.name!r} fails to answer {what}(): {cause(error)}") from error


@dataclass(frozen=True)
class View:
    """What one query may depend on through one branch. `seen` is bool (T, H, W)."""

    name: str
    seen: np.ndarray

    @property
    def tokens(self) -> int:
        return int(np.count_nonzero(self.seen))

    @property
    def share(self) -> float:
        return self.tokens / self.seen.size

    @property
    def per_frame(self) -> np.ndarray:
        """Share of each frame that is seen, (T,)."""
        return self.seen.mean(axis=(1, 2))


@dataclass(frozen=True)
class Views:
    """The layers in which a query has the same views. `attention` is the name of what runs there; `selects`: do the data
    choose inside them?"""

    layers: tuple[int, ...]
    attention: str
    start: str
    bound: str
    query: tuple[int, int, int]
    views: tuple[View, ...]
    selects: bool = False

    @property
    def title(self) -> str:
        return f"layer{'s' if len(self.layers) > 1 else ''} {layer_list(self.layers)}"

    @property
    def whole(self) -> View:
        """The view of the whole attention."""
        return self.views[-1]


def bound(spec: AttentionSpec) -> tuple[str, bool]:
    """What `visible` is, ``exact`` or ``upper bound``, and whether the data choose inside it.

    Where a far field gives every query what was not chosen, nothing is left to choose.
    """
    traits = spec.traits()
    return traits.visible, traits.visible != "exact" and traits.selects


def default_query(grid: Grid) -> tuple[int, int, int]:
    """A token near the middle, but off the axes of symmetry, where window borders tend to lie."""
    return (grid.t // 2, grid.h * 9 // 20, grid.w * 9 // 20)


def parse_query(text: str, grid: Grid) -> tuple[int, int, int]:
    """A query from ``t,y,x`` or, on an image, ``y,x``; raises UsageError when it is not on the grid."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if grid.t == 1 and len(numbers) == 2:
        numbers = [0, *numbers]
    if len(numbers) != 3:
        form = "y,x or 0,y,x" if grid.t == 1 else "t,y,x"
        raise UsageError(f"a query is {form} (whole numbers, counted from 0), got {text!r}")
    for axis, number, size in zip("tyx", numbers, grid, strict=True):
        if not 0 <= number < size:
            raise UsageError(
                f"query {text!r}: {axis} = {number} is outside the grid {grid}, whose {axis} is 0..{size - 1}"
            )
    return (numbers[0], numbers[1], numbers[2])


def views(spec: AttentionSpec, site: Site, query: tuple[int, int, int]) -> tuple[View, ...]:
    """The query's view through each branch of `spec`, or each group of heads where heads differ; last through all of it.

    Raises Silent, with the name of the attention, where `spec` fails to answer.
    """
    grid = site.grid
    token = (query[0] * grid.h + query[1]) * grid.w + query[2]
    whole = asking(spec, "visible", lambda: np.asarray(spec.visible(site, [token]), dtype=bool))
    parts: Mapping[str, np.ndarray] = {}
    by_branch = getattr(spec, "visible_by_branch", None)
    if by_branch is not None:
        parts = asking(spec, "visible_by_branch", lambda: by_branch(site, [token]))
    elif len(whole) > 1:
        parts = _by_heads(whole)
    rows = [View(name, _on_grid(seen, grid)) for name, seen in parts.items()]
    return (*rows, View(ALL, _on_grid(whole, grid)))


def _by_heads(seen: np.ndarray) -> dict[str, np.ndarray]:
    """(heads, 1, N) → the views of heads that see alike, by name; nothing where all do, or where there are too many."""
    groups: dict[bytes, list[int]] = {}
    for head, one in enumerate(seen):
        groups.setdefault(np.packbits(one).tobytes(), []).append(head)
    if not 1 < len(groups) <= MOST_HEADS:
        return {}
    return {f"head{'s' * (len(heads) > 1)} {layer_list(heads)}": seen[heads[0]] for heads in groups.values()}


def _on_grid(seen: np.ndarray, grid: Grid) -> np.ndarray:
    """(heads, 1, N) → (T, H, W): seen by any head."""
    flat = np.asarray(seen, dtype=bool).reshape(-1, grid.tokens)
    return flat.any(axis=0).reshape(grid)


def grouped(
    sites: Sequence[Site],
    attention: Sequence[AttentionSpec],
    query: tuple[int, int, int] | None = None,
    written: Sequence[AttentionSpec] = (),
) -> list[Views]:
    """Views of every layer, one entry per distinct set of views, in order of first appearance.

    `attention` are the specs that run, `written` those of the recipe before compositions were expanded; names and
    starts are taken from the latter. The layers of two parities come apart by themselves where a shift makes them
    differ.
    """
    if not sites:
        return []
    query = query or default_query(sites[0].grid)
    found: dict[tuple[str, str, bytes], tuple[list[int], tuple[View, ...], tuple[str, bool]]] = {}
    for site, spec, asked in zip(sites, attention, written or attention, strict=True):
        now = views(spec, site, query)
        traits = asked.traits()
        name = spec.name if asked.name == spec.name else f"{asked.name} = {spec.name}"
        key = (name, str(traits.start), _digest(now))
        found.setdefault(key, ([], now, bound(spec)))[0].append(site.layer)
    return [
        Views(tuple(layers), name, start, known, query, now, selects)
        for (name, start, _), (layers, now, (known, selects)) in found.items()
    ]


def _digest(rows: Sequence[View]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        state.update(row.name.encode())
        state.update(np.packbits(row.seen).tobytes())
    return state.digest()
