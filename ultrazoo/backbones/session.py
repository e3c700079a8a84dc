"""What every model with our attentions keeps beside its modules: specs per layer, sampling step, state, sizes seen.

Native backbones own one; adapters put one on a model of another library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..attention.contract import Call
from ..attention.scheduled import Scheduled
from ..errors import Problem, SiteError, UsageError
from ..grid import Grid
from ..spec import AttentionSpec, BackboneSpec
from .layers import traced

Steps = Sequence[tuple[int, int, Mapping[int, AttentionSpec]]]
"""Step ranges (first, last inclusive, {layer: attention}) that override the layer map while sampling."""

_SIZES_REMEMBERED = 256


class Session:
    """Attention specs of every layer of a backbone, expanded at `grid`, and the facts of the sampling run.

    Raises SiteError with the problems of every layer, UsageError for a wrong number of layers.
    """

    def __init__(self, spec: BackboneSpec, attention: Sequence[AttentionSpec], grid: Grid, steps: Steps = ()):
        if len(attention) != spec.layers:
            raise UsageError(f"backbone {spec.name!r} has {spec.layers} layers, got {len(attention)} attentions")
        self.spec = spec
        self.sites = spec.sites(grid)
        self.specs = [one.expand(site) for one, site in zip(attention, self.sites, strict=True)]
        self.alternatives: list[list[tuple[int, int, AttentionSpec]]] = [[] for _ in self.sites]
        for first, last, layers in steps:
            for layer, one in layers.items():
                self.alternatives[layer].append((first, last, one.expand(self.sites[layer])))
        self.step: tuple[int, int] | None = None
        self.branch: str | None = None
        self.state: dict[str | None, dict[int, dict[Any, Any]]] = {}
        self._sizes: set[Grid] = set()
        if found := spec.problems(self.sites[0]):
            raise SiteError(f"backbone {spec.name!r}", found)
        self.require(grid)

    # sizes

    def problems_at(self, grid: Grid) -> list[Problem]:
        """Everything wrong with the attentions at `grid`; one problem of several layers is listed once."""
        layers: dict[Problem, list[int]] = {}
        for layer, site in enumerate(self.spec.sites(grid)):
            for problem in self.specs[layer].problems(site):
                layers.setdefault(problem, []).append(layer)
            for first, last, one in self.alternatives[layer]:
                for problem in one.problems(site):
                    layers.setdefault(problem.under(f"(steps {first}-{last})"), []).append(layer)
        return [problem.under(f"attention.{ranges(where)}") for problem, where in layers.items()]

    def require(self, grid: Grid) -> None:
        """Raise SiteError unless every attention can run at `grid`. A size that passed is remembered."""
        if grid in self._sizes:
            return
        if found := self.problems_at(grid):
            raise SiteError(f"{self.spec.name} at grid {grid}", found)
        if len(self._sizes) >= _SIZES_REMEMBERED:
            self._sizes.clear()
        self._sizes.add(grid)

    # sampling steps and state

    def select(self, step: int, count: int, branch: str | None = None) -> None:
        """Say which of `count` sampling steps (0-based) the next forwards belong to, and which guidance branch.

        Step 0 begins a clip: whatever the attentions kept for that branch is dropped.
        """
        for name, number in (("step", step), ("count", count)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise UsageError(f"{name} is a whole number, got {number!r}")
        if not 0 <= step < count:
            raise UsageError(f"step {step} of {count} does not exist: steps are 0 to {count - 1}")
        if step == 0:
            self.state.pop(branch, None)
        self.step = (step, count)
        self.branch = branch

    @contextlib.contextmanager
    def announced(self, branch: str, step: int | None, count: int | None) -> Iterator[None]:
        """One forward of a pipeline: guidance branch and, where it says so, the sampling step; the selection before is
        restored afterwards. A pipeline that does not say the step leaves alone what was selected by step and branch."""
        before = self.step, self.branch
        if step is not None and count is not None:
            self.select(step, count, branch)
        elif self.branch is None:
            self.branch = branch
        try:
            yield
        finally:
            self.step, self.branch = before

    def deselect(self) -> None:
        """Forget the step: forwards belong to no sampling run any more."""
        self.step = self.branch = None

    def reset_state(self) -> None:
        """Drop everything that attentions kept between calls, in every guidance branch."""
        self.state.clear()

    def state_of(self, layer: int) -> dict[Any, Any] | None:
        """What layer `layer` keeps between calls of this guidance branch; None when nothing may be kept."""
        # what a mechanism keeps must not depend on whether a backward recomputes it, nor enter a graph
        if self.step is None or torch.is_grad_enabled() or traced():
            return None
        return self.state.setdefault(self.branch, {}).setdefault(layer, {})

    # layers

    def attention_of(self, layer: int) -> nn.Module:
        """A fresh attention for `layer`, with its alternatives at other sampling steps where it has some."""
        spec, site = self.specs[layer], self.sites[layer]
        if self.alternatives[layer]:
            return Scheduled(spec, self.alternatives[layer], site)
        return spec.build(site)  # type: ignore[no-any-return]

    def call(self, layer: int, grid: tuple[int, int, int], timestep: torch.Tensor | None) -> Call:
        """The call of one layer, of its own: nobody changes it afterwards, so a block that is recomputed under gradient
        checkpointing sees what its forward saw, whatever ran in between."""
        return Call(grid=grid, timestep=timestep, step=self.step, branch=self.branch, state=self.state_of(layer))


def ranges(layers: list[int]) -> str:
    """Layer numbers as recipes write them: ``0-3,7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)
