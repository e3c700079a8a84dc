"""The selector around a selector that gives it another kept share per head or per denoising step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import Problem
from ...options import FrozenMap
from ...spec import Site, option
from .around import AroundSpec
from .orders import Place
from .scene import Rows, Scene, checked
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
class BudgetSpec(AroundSpec):
    """Another kept share per head or per denoising step than the inner selector's own; another mass where its rule is topp.

    A share per head is what HASTE (arXiv 2605.14513) finds offline. Steps are indices of the sampler; steps that are not
    listed keep the inner selector's share. A call that does not say its step keeps everything: missing step information
    never means sparse.
    """

    name: ClassVar[str] = "budget"
    source: ClassVar[str] = "DFSAttn, arXiv 2605.23445, per step; HASTE, arXiv 2605.14513, per head"
    minimal: ClassVar[Mapping[str, Any]] = {"of": {"name": "pooled"}, "steps": {"0-9": 1.0}}

    of: SelectorSpec = option(doc="the selector whose share changes", kind="selector")
    heads: tuple[float, ...] | None = option(None, "share per head", gt=0, le=1)
    steps: Mapping[str, float] | None = option(None, "step ranges → share, 1 is dense", gt=0, le=1)

    def __post_init__(self) -> None:
        # specs are keys of caches
        if self.steps is not None and not isinstance(self.steps, FrozenMap):
            object.__setattr__(self, "steps", FrozenMap(self.steps))

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.heads is None and not self.steps:
            found.append(Problem("heads", "neither heads nor steps is given", "give one of them"))
        if self.heads is not None and len(self.heads) != site.heads:
            rule = f"{len(self.heads)} shares for {site.heads} heads"
            found.append(Problem("heads", rule, "give one per head"))
        found += self._step_problems(site.steps)
        if not self.of.budgeted:
            fix = "give a pooled selector with rule topk, topp or topk_or_topp, or one around it"
            found.append(Problem("of", "has no kept share", fix))
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

    def _shares(self, site: Site) -> list[float | None]:
        return list(self.heads) if self.heads is not None else [None]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        """Over all steps at which it runs, the mean of them expected; of a step that is not listed where their number is not
        known. A call that does not say its step is the most."""
        everything = place.queries.tokens * place.keys.starts[place.selectable]
        rows = [self.of.bounds(place, site, share) for share in self._shares(site)]
        own = Bounds(*(round(float(np.mean(column))) for column in zip(*rows, strict=True)))
        if self.steps is None:
            return own
        known: dict[float | None, Bounds] = {None: own, 1.0: Bounds(*[everything] * 3)}
        for share in self.steps.values():
            known.setdefault(share, self.of.bounds(place, site, share))
        runs = range(site.steps or 0) if site.runs is None else site.runs
        steps = [known[self.share_at(step)] for step in runs]
        expected = round(sum(one.expected for one in steps) / len(steps)) if steps else own.expected
        return Bounds(min(one.least for one in steps or known.values()), expected, everything)

    def share_at(self, step: int) -> float | None:
        """The share that is listed for a step; None where none is."""
        return next((share for key, share in (self.steps or {}).items() if in_ranges(key, step)), None)

    @property
    def counts_steps(self) -> bool:
        return bool(self.steps)

    def phase(self, step: int) -> Any:
        return self.share_at(step), self.of.phase(step)

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
        return checked(self.spec.of.name, self.of(scene.with_keep(keep)), scene)


def dense_rows(scene: Scene) -> Rows:
    """Every selectable block."""

    def rows(lo: int, hi: int) -> Tensor:
        return torch.ones(1, 1, hi - lo, scene.place.selectable, dtype=torch.bool, device=scene.q.device)

    return rows
