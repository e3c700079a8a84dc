"""Selectors: which key blocks each query block visits.

Static selectors are maps known from sizes alone, made row by row by arithmetic; dynamic ones look at the data. Every query
block sees at least what its selector chose; extra tokens that all see are added outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import Problem, UsageError
from ...spec import Site, Spec, option
from .orders import Place
from .scene import Rows, Scene, checked

CHUNK = 1 << 22
"""Entries of a static map made at a time."""


class Bounds(NamedTuple):
    """Query-key pairs per head over the grid and pattern rows: fewest, expected, most."""

    least: int
    expected: int
    most: int


@dataclass(frozen=True, kw_only=True)
class SelectorSpec(Spec):
    """Chooses key blocks for query blocks. `static`: from sizes alone. `needs_grid`: has no answer for extra tokens."""

    kind: ClassVar[str] = "selector"
    static: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    @property
    def is_static(self) -> bool:
        return self.static

    @property
    def by_layer(self) -> bool:
        """Does the map depend on the layer?"""
        return False

    @property
    def budgeted(self) -> bool:
        """Does the share that a `budget` around it gives stand in for one of its own (`Scene.keep`)?"""
        return False

    @property
    def counts_steps(self) -> bool:
        """Does it name denoising steps, so that a recipe has to say how many there are?"""
        return False

    def phase(self, step: int) -> Any:
        """What the map owes to the denoising step alone: maps of steps whose phases are equal may stand for each other."""
        return None

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        """What is wrong at this size and order."""
        return []

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        """Static selectors: bool (1 | heads, hi - lo, selectable blocks) of query blocks lo..hi."""
        raise TypeError(f"{type(self).__name__} has no map")

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        """Pairs per head with the selectable blocks."""
        assert self.is_static, f"{type(self).__name__} does not say how much it keeps"
        total = static_pairs(self, place, site)
        return Bounds(total, total, total)

    def flops(self, place: Place, site: Site) -> int:
        """FLOPs of scoring, per layer."""
        return 0

    def parameters(self, site: Site) -> int:
        return 0

    def kept_bytes(self, place: Place, site: Site) -> int:
        """Bytes of maps that stay in the call's state between steps: batch 1, one guidance branch."""
        return 0

    def keeps_all(self) -> bool:
        """Does it keep every block, whatever the data?"""
        return False

    def frozen(self) -> tuple[str, ...]:
        """Own parameters that are used and not trained, by name."""
        return ()

    @property
    def softness(self) -> float | None:
        """Temperature of a selector that weighs every block, with gradients; None where it chooses."""
        return None

    def build(self, site: Site) -> nn.Module:
        """``module(scene)`` → rows (see `scene.Rows`)."""
        return _Static(self, site)


def parts_of(selector: SelectorSpec) -> dict[str, SelectorSpec]:
    """The selectors that a selector is around, by their paths in it."""
    inner = getattr(selector, "of", ())
    found = {f"of.{i}": one for i, one in enumerate(inner)} if isinstance(inner, tuple) else {"of": inner}
    return {path: one for path, one in found.items() if isinstance(one, SelectorSpec)}


def nested(selector: SelectorSpec) -> Iterator[SelectorSpec]:
    """A selector and all that are inside it."""
    yield selector
    for one in parts_of(selector).values():
        yield from nested(one)


def selector_problems(selector: SelectorSpec, place: Place, site: Site) -> list[Problem]:
    """What a selector, or one inside it, leaves unsaid that a plan or a call asks for, and a map of the wrong kind: one row is
    made for it."""
    found = [
        problem.under(path)
        for path, one in parts_of(selector).items()
        for problem in selector_problems(one, place, site)
    ]
    own, allowed = type(selector), f"bool (1, rows, {place.selectable}) or ({site.heads}, rows, {place.selectable})"
    if found:
        return found
    if not selector.is_static:
        if own.bounds is SelectorSpec.bounds:
            rule = f"{selector.name!r} is not static and does not say how much it keeps"
            found.append(
                Problem("", rule, "give it bounds(place, site, keep): fewest, expected and most pairs per head")
            )
        if own.build is SelectorSpec.build:
            rule = f"{selector.name!r} is neither static nor has it a module that looks at the data"
            found.append(Problem("", rule, "give it build(site), or a map and static = True"))
        if not found:
            everything, said = place.queries.tokens * place.keys.starts[place.selectable], selector.bounds(place, site)
            if not 0 <= said.least <= said.expected <= said.most <= everything:
                rule = f"{selector.name!r} keeps {said.least}, {said.expected} and {said.most} pairs of {everything}"
                found.append(
                    Problem("", rule, "give the fewest, the expected and the most, in this order, at most all")
                )
        return found
    if own.map is SelectorSpec.map:
        rule = f"{selector.name!r} is static and has no map"
        return [Problem("", rule, f"give it map(place, site, lo, hi): {allowed}")]
    row = selector.map(place, site, 0, 1)
    if not isinstance(row, np.ndarray):
        return [
            Problem("", f"{selector.name!r} has a map of type {type(row).__name__}", f"a map is numpy's, {allowed}")
        ]
    if row.dtype != bool or row.shape not in _shapes(1, place, site):
        rule = f"{selector.name!r} maps one query block to {row.dtype} {row.shape}"
        return [Problem("", rule, f"a map is {allowed}")]
    return []


def chunks_of(place: Place, heads: int) -> list[tuple[int, int]]:
    """Ranges of query blocks whose map is of bounded size."""
    step = max(1, CHUNK // max(1, heads * place.selectable))
    return [(lo, min(lo + step, place.queries.count)) for lo in range(0, place.queries.count, step)]


def _shapes(rows: int, place: Place, site: Site) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes that a static map of so many query blocks may have: of all heads, or of each."""
    return (1, rows, place.selectable), (site.heads, rows, place.selectable)


def static_pairs(spec: SelectorSpec, place: Place, site: Site) -> int:
    """Pairs per head of a static map, rounded to whole pairs where heads differ."""
    keys = place.keys.sizes[: place.selectable].astype(np.float64)
    total = 0.0
    for lo, hi in chunks_of(place, site.heads):
        found = spec.map(place, site, lo, hi)
        if found.dtype != bool or found.shape not in _shapes(hi - lo, place, site):
            allowed = " or ".join(str(shape) for shape in _shapes(hi - lo, place, site))
            got = f"{found.dtype} {found.shape}"
            raise UsageError(
                f"selector {spec.name!r} maps query blocks {lo} to {hi - 1} to {got}; a map is bool {allowed}"
            )
        total += float(((found @ keys) * place.queries.sizes[lo:hi]).sum()) / found.shape[0]
    return round(total)


class _Static(nn.Module):
    """A map that needs no data."""

    def __init__(self, spec: SelectorSpec, site: Site):
        super().__init__()
        self.spec, self.site = spec, site

    def forward(self, scene: Scene) -> Rows:
        place, site = scene.place, self.site.at(grid=scene.place.grid)

        def rows(lo: int, hi: int) -> Tensor:
            # a copy: maps may be views that nobody may write to
            found = torch.from_numpy(np.array(self.spec.map(place, site, lo, hi)))
            return found.unsqueeze(0).to(scene.q.device)

        return rows


@dataclass(frozen=True, kw_only=True)
class AllSpec(SelectorSpec):
    """Every block: full attention."""

    name: ClassVar[str] = "all"
    static: ClassVar[bool] = True

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        return np.ones((1, hi - lo, place.selectable), dtype=bool)

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        total = place.queries.tokens * place.keys.starts[place.selectable]
        return Bounds(total, total, total)

    def keeps_all(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class BandSpec(SelectorSpec):
    """Key blocks within `width` blocks of the query block, in the order of tokens; 0 is the own block."""

    name: ClassVar[str] = "band"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    width: int = option(1, "blocks to either side", ge=0)

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        first, end = self._near(place, lo, hi)
        at = np.arange(place.selectable)
        return ((at >= first[:, None]) & (at < end[:, None]))[None]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        first, end = self._near(place, 0, place.queries.count)
        starts = np.asarray(place.keys.starts)
        total = int(place.queries.sizes @ (starts[end] - starts[first]))
        return Bounds(total, total, total)

    def _near(self, place: Place, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """First key block and end for query blocks lo..hi.

        Blocks of queries and keys may differ in size: a key block is near if any of its tokens' blocks is.
        """
        starts, at = np.asarray(place.queries.starts), np.arange(lo, hi)
        width = min(self.width, place.queries.count)
        first = starts[np.maximum(at - width, 0)]
        end = starts[np.minimum(at + width + 1, place.queries.count)]
        keys = np.asarray(place.keys.starts[: place.selectable + 1])
        return np.searchsorted(keys[1:], first, side="right"), np.searchsorted(keys[:-1], end, side="left")


@dataclass(frozen=True, kw_only=True)
class SinkSpec(SelectorSpec):
    """Key blocks that hold a token of the first frames, for every query block."""

    name: ClassVar[str] = "sink"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    frames: int = option(1, "first frames that all see", ge=1)

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        grid = place.grid
        in_sink = np.arange(grid.tokens) < min(self.frames, grid.t) * grid.h * grid.w
        if place.order is not None:
            in_sink = in_sink[place.order]
        starts = np.asarray(place.keys.starts[: place.selectable])
        holds = np.logical_or.reduceat(in_sink, starts)
        return np.broadcast_to(holds[None, None], (1, hi - lo, place.selectable))


@dataclass(frozen=True, kw_only=True)
class UnionSpec(SelectorSpec):
    """What any of several selectors chooses: a dynamic one with forced bands and sinks, or several static ones."""

    name: ClassVar[str] = "union"
    minimal: ClassVar[Mapping[str, Any]] = {"of": [{"name": "pooled"}, {"name": "band"}]}

    of: tuple[SelectorSpec, ...] = option(doc="selectors", kind="selector")

    @property
    def is_static(self) -> bool:
        return all(one.is_static for one in self.of)

    @property
    def by_layer(self) -> bool:
        return any(one.by_layer for one in self.of)

    @property
    def budgeted(self) -> bool:
        return any(one.budgeted for one in self.of)

    def phase(self, step: int) -> Any:
        return tuple(one.phase(step) for one in self.of)

    def problems(self, site: Site) -> list[Problem]:
        if not self.of:
            return [Problem("of", "there are none", "give at least one selector")]
        return [p.under(f"of.{i}") for i, one in enumerate(self.of) for p in one.problems(site)]

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        return [p.under(f"of.{i}") for i, one in enumerate(self.of) for p in one.place_problems(place, site)]

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        out = self.of[0].map(place, site, lo, hi)
        for one in self.of[1:]:
            out = out | one.map(place, site, lo, hi)
        return out

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        if self.is_static:
            return super().bounds(place, site, keep)
        fixed = [one for one in self.of if one.is_static]
        # one that stands alone may know its pairs without a map
        forced = fixed[0] if len(fixed) == 1 else UnionSpec(of=tuple(fixed))
        static = forced.bounds(place, site).expected if fixed else 0
        moving = [one.bounds(place, site, keep) for one in self.of if not one.is_static]
        everything = place.queries.tokens * place.keys.starts[place.selectable]
        # what is chosen and what is forced may coincide wholly or not at all; expected as if they were independent
        missed = 1 - static / everything
        for one in moving:
            missed *= 1 - one.expected / everything
        least = max(static, *(one.least for one in moving))
        most = min(everything, static + sum(one.most for one in moving))
        return Bounds(least, min(most, max(least, round(everything * (1 - missed)))), most)

    def flops(self, place: Place, site: Site) -> int:
        return sum(one.flops(place, site) for one in self.of)

    def parameters(self, site: Site) -> int:
        return sum(one.parameters(site) for one in self.of)

    def kept_bytes(self, place: Place, site: Site) -> int:
        return sum(one.kept_bytes(place, site) for one in self.of)

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"of.{i}.{name}" for i, one in enumerate(self.of) for name in one.frozen())

    def keeps_all(self) -> bool:
        return any(one.keeps_all() for one in self.of)

    def build(self, site: Site) -> nn.Module:
        return _Union(self, [one.build(site) for one in self.of])


class _Union(nn.Module):
    def __init__(self, spec: UnionSpec, parts: Sequence[nn.Module]):
        super().__init__()
        self.spec, self.of = spec, nn.ModuleList(parts)

    def forward(self, scene: Scene) -> Rows:
        made = [checked(one.name, part(scene), scene) for one, part in zip(self.spec.of, self.of, strict=True)]

        def rows(lo: int, hi: int) -> Tensor:
            out = made[0](lo, hi)
            for one in made[1:]:
                out = out | one(lo, hi)
            return out

        return rows
