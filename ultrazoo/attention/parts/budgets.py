"""Selectors around a selector: budgets per head and per denoising step, and maps kept over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import Problem
from ...options import FrozenMap
from ...spec import Site, option
from .kept import KeptRows, kept_bytes
from .orders import Place
from .scene import Rows, Scene
from .selectors import Bounds, SelectorSpec


def ranges_of(key: str) -> list[range]:
    """Steps of a list of ranges such as ``0-9`` or ``0,4-6``; raises ValueError for anything else."""
    found = []
    for part in key.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is not a number or a range")
        if dash and int(last) < int(first):
            raise ValueError(f"{part.strip()!r} runs backwards")
        found.append(range(int(first), int(last if dash else first) + 1))
    return found


def in_ranges(key: str, index: int) -> bool:
    """Is `index` in a list of ranges? Raises ValueError for what is no such list."""
    return any(index in one for one in ranges_of(key))


@dataclass(frozen=True, kw_only=True)
class BudgetSpec(SelectorSpec):
    """Another kept share per head or per denoising step than the inner selector's own.

    Steps are indices of the sampler; steps that are not listed keep the inner selector's share. A call that does not say
    its step keeps everything: missing step information never means sparse.
    """

    name: ClassVar[str] = "budget"
    minimal: ClassVar[Mapping[str, Any]] = {"of": {"name": "pooled"}, "steps": {"0-9": 1.0}}

    of: SelectorSpec = option(doc="the selector whose share changes", kind="selector")
    heads: tuple[float, ...] | None = option(None, "share per head", gt=0, le=1)
    steps: Mapping[str, float] | None = option(None, "step ranges → share, 1 is dense", gt=0, le=1)

    def __post_init__(self) -> None:
        # specs are keys of caches
        if self.steps is not None and not isinstance(self.steps, FrozenMap):
            object.__setattr__(self, "steps", FrozenMap(self.steps))

    @property
    def is_static(self) -> bool:
        return False

    @property
    def by_layer(self) -> bool:
        return self.of.by_layer

    def problems(self, site: Site) -> list[Problem]:
        found = [problem.under("of") for problem in self.of.problems(site)]
        if self.heads is None and not self.steps:
            found.append(Problem("heads", "neither heads nor steps is given", "give one of them"))
        if self.heads is not None and len(self.heads) != site.heads:
            rule = f"{len(self.heads)} shares for {site.heads} heads"
            found.append(Problem("heads", rule, "give one per head"))
        found += self._step_problems(site.steps)
        if not getattr(getattr(self.of, "rule", None), "name", "").startswith("topk"):
            found.append(Problem("of", "has no kept share", "give a pooled selector with rule topk"))
        return found

    def _step_problems(self, count: int | None) -> list[Problem]:
        found: list[Problem] = []
        taken: list[tuple[range, str]] = []
        for key in self.steps or {}:
            try:
                spans = ranges_of(key)
            except ValueError as error:
                found.append(Problem(f"steps.{key}", str(error), "write 0-9 or 0,4-6"))
                continue
            last = max(span[-1] for span in spans)
            if count is not None and last >= count:
                rule = f"step {last} does not exist: sampling takes {count} steps, 0-{count - 1}"
                found.append(Problem(f"steps.{key}", rule, f"name steps up to {count - 1}, or more sampling.steps"))
                continue
            for span in spans:
                twice = [
                    (max(span[0], one[0]), other) for one, other in taken if span[0] <= one[-1] and one[0] <= span[-1]
                ]
                if twice:
                    step, other = twice[0]
                    found.append(Problem(f"steps.{key}", f"step {step} is in {other!r} too", "name every step once"))
                taken.append((span, key))
        return found

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        return [problem.under("of") for problem in self.of.place_problems(place, site)]

    def _shares(self, site: Site) -> list[float | None]:
        return list(self.heads) if self.heads is not None else [None]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        """Over all steps, the mean of them expected; of a step that is not listed where their number is not known. A call that
        does not say its step is the most."""
        everything = place.queries.tokens * place.keys.starts[place.selectable]
        rows = [self.of.bounds(place, site, share) for share in self._shares(site)]
        own = Bounds(*(round(float(np.mean(column))) for column in zip(*rows, strict=True)))
        if self.steps is None:
            return own
        known: dict[float | None, Bounds] = {None: own, 1.0: Bounds(*[everything] * 3)}
        for share in self.steps.values():
            known.setdefault(share, self.of.bounds(place, site, share))
        steps = None if site.steps is None else [known[self.share_at(step)] for step in range(site.steps)]
        expected = own.expected if steps is None else round(sum(one.expected for one in steps) / len(steps))
        return Bounds(min(one.least for one in steps or known.values()), expected, everything)

    def share_at(self, step: int) -> float | None:
        """The share that is listed for a step; None where none is."""
        return next((share for key, share in (self.steps or {}).items() if in_ranges(key, step)), None)

    def flops(self, place: Place, site: Site) -> int:
        return self.of.flops(place, site)

    def parameters(self, site: Site) -> int:
        return self.of.parameters(site)

    def kept_bytes(self, place: Place, site: Site) -> int:
        return self.of.kept_bytes(place, site)

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"of.{name}" for name in self.of.frozen())

    def keeps_all(self) -> bool:
        shares = (*(self.heads or ()), *(self.steps or {}).values())
        return self.heads is not None and all(share == 1 for share in shares)

    def build(self, site: Site) -> nn.Module:
        return _Budget(self, self.of.build(site))


class _Budget(nn.Module):
    def __init__(self, spec: BudgetSpec, inner: nn.Module):
        super().__init__()
        self.spec, self.of = spec, inner

    def forward(self, scene: Scene) -> Rows:
        keep: float | tuple[float, ...] | None = self.spec.heads
        if self.spec.steps is not None:
            if scene.step is None:
                return dense_rows(scene)
            listed = self.spec.share_at(scene.step[0])
            keep = keep if listed is None else listed
            if keep == 1.0:
                return dense_rows(scene)
        found: Rows = self.of(scene.with_keep(keep))
        return found


def dense_rows(scene: Scene) -> Rows:
    """Every selectable block."""

    def rows(lo: int, hi: int) -> Tensor:
        return torch.ones(1, 1, hi - lo, scene.place.selectable, dtype=torch.bool, device=scene.q.device)

    return rows


@dataclass(frozen=True, kw_only=True)
class CachedSpec(SelectorSpec):
    """The inner selector's map, made anew every few steps and used again in between (DFSAttn, arXiv 2605.23445).

    Kept in the call's state, one per selector, layer and guidance branch, as lists of visited blocks in the machine's memory
    (two bytes a visit, or bits where they are smaller); made anew as well where the grid, the extra tokens or the batch are
    others, or the step is an earlier one. Without state or step the map is made in each call.
    """

    name: ClassVar[str] = "cached"
    minimal: ClassVar[Mapping[str, Any]] = {"of": {"name": "pooled"}, "every": 12}

    of: SelectorSpec = option(doc="the selector whose map is kept", kind="selector")
    every: int = option(12, "denoising steps between two maps", ge=1)

    @property
    def is_static(self) -> bool:
        return False

    @property
    def by_layer(self) -> bool:
        return self.of.by_layer

    def problems(self, site: Site) -> list[Problem]:
        return [problem.under("of") for problem in self.of.problems(site)]

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        return [problem.under("of") for problem in self.of.place_problems(place, site)]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        return self.of.bounds(place, site, keep)

    def flops(self, place: Place, site: Site) -> int:
        return self.of.flops(place, site)

    def parameters(self, site: Site) -> int:
        return self.of.parameters(site)

    def kept_bytes(self, place: Place, site: Site) -> int:
        """Of the fullest map that its bounds allow."""
        everything = place.queries.tokens * place.keys.starts[place.selectable]
        rows = site.heads * place.queries.count
        visited = math.ceil(rows * place.selectable * self.bounds(place, site).most / max(1, everything))
        return self.of.kept_bytes(place, site) + kept_bytes(rows, place.selectable, visited)

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"of.{name}" for name in self.of.frozen())

    def keeps_all(self) -> bool:
        return self.of.keeps_all()

    def build(self, site: Site) -> nn.Module:
        return _Cached(self, self.of.build(site))


@dataclass
class _Kept:
    """Rows of a map, with what they were made for."""

    made_for: Any
    step: int
    rows: dict[tuple[int, int], KeptRows]


class _Cached(nn.Module):
    def __init__(self, spec: CachedSpec, inner: nn.Module):
        super().__init__()
        self.spec, self.of = spec, inner

    def forward(self, scene: Scene) -> Rows:
        fresh: Rows = self.of(scene)
        if scene.state is None or scene.step is None:
            return fresh
        place, step = scene.place, scene.step[0]
        made_for = (step // self.spec.every, place.grid, place.queries, place.keys, place.selectable, scene.q.shape[:2])
        # head groups and united selectors of one layer share its state: each keeps its own map
        key = ("selector", scene.layer, scene.branch, id(self))
        kept = scene.state.get(key)
        if kept is None or kept.made_for != made_for or step < kept.step:
            kept = scene.state[key] = _Kept(made_for, step, {})
        kept.step = step
        held: _Kept = kept

        def rows(lo: int, hi: int) -> Tensor:
            if (lo, hi) not in held.rows:
                held.rows[(lo, hi)] = KeptRows.of(fresh(lo, hi))
            return held.rows[(lo, hi)].rows(scene.q.device)

        return rows
