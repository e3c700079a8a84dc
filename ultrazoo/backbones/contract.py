"""What every native backbone has: attentions built from specs, sampling steps, state, size checks, checkpointing.

A subclass makes its layers, each with the attention that `attention_of` gives it, and runs them with `run_blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention.contract import Call
from ..attention.scheduled import Scheduled
from ..errors import Problem, SiteError, UsageError
from ..grid import Grid
from ..spec import AttentionSpec, BackboneSpec
from .ffn import GluMbConv
from .layers import traced

Steps = Sequence[tuple[int, int, Mapping[int, AttentionSpec]]]
"""Step ranges (first, last inclusive, {layer: attention}) that override the layer map while sampling."""

_SIZES_REMEMBERED = 256


class Backbone(nn.Module):
    """A diffusion transformer whose layer i runs ``attention[i]`` over a token grid.

    `grid` is the size the attentions are built and first checked for; a forward at another size checks again, once.
    `plan` is set by whoever builds from a recipe. Raises SiteError with the problems of every layer, UsageError for a
    wrong number of layers.
    """

    blocks: nn.ModuleList

    def __init__(self, spec: BackboneSpec, attention: Sequence[AttentionSpec], grid: Grid, steps: Steps = ()):
        super().__init__()
        if len(attention) != spec.layers:
            raise UsageError(f"backbone {spec.name!r} has {spec.layers} layers, got {len(attention)} attentions")
        self.spec = spec
        self.plan: Any = None
        self.gradient_checkpointing = False
        self._sites = spec.sites(grid)
        self._specs = [one.expand(site) for one, site in zip(attention, self._sites, strict=True)]
        self._alternatives: list[list[tuple[int, int, AttentionSpec]]] = [[] for _ in self._sites]
        for first, last, layers in steps:
            for layer, one in layers.items():
                self._alternatives[layer].append((first, last, one.expand(self._sites[layer])))
        self._step: tuple[int, int] | None = None
        self._branch: str | None = None
        self._state: dict[str | None, dict[int, dict[Any, Any]]] = {}
        self._sizes: set[Grid] = set()
        if found := spec.problems(self._sites[0]):
            raise SiteError(f"backbone {spec.name!r}", found)
        self.require(grid)

    # sizes

    def problems_at(self, grid: Grid) -> list[Problem]:
        """Everything wrong with the attentions at `grid`; one problem of several layers is listed once."""
        layers: dict[Problem, list[int]] = {}
        for layer, site in enumerate(self.spec.sites(grid)):
            for problem in self._specs[layer].problems(site):
                layers.setdefault(problem, []).append(layer)
            for first, last, one in self._alternatives[layer]:
                for problem in one.problems(site):
                    layers.setdefault(problem.under(f"(steps {first}-{last})"), []).append(layer)
        return [problem.under(f"attention.{_ranges(where)}") for problem, where in layers.items()]

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
        if not 0 <= step < count:
            raise UsageError(f"step {step} of {count} does not exist: steps are 0 to {count - 1}")
        if step == 0:
            self._state.pop(branch, None)
        self._step = (step, count)
        self._branch = branch

    def deselect(self) -> None:
        """Forget the step: forwards belong to no sampling run any more."""
        self._step = self._branch = None

    def reset_state(self) -> None:
        """Drop everything that attentions kept between calls, in every guidance branch."""
        self._state.clear()

    def _state_of(self, layer: int) -> dict[Any, Any] | None:
        # what a mechanism keeps must not depend on whether a backward recomputes it, nor enter a graph
        if self._step is None or torch.is_grad_enabled() or traced():
            return None
        return self._state.setdefault(self._branch, {}).setdefault(layer, {})

    # layers

    def attention_of(self, layer: int) -> nn.Module:
        """A fresh attention for `layer`, with its alternatives at other sampling steps where it has some."""
        spec, site = self._specs[layer], self._sites[layer]
        if self._alternatives[layer]:
            return Scheduled(spec, self._alternatives[layer], site)
        return spec.build(site)  # type: ignore[no-any-return]

    def run_blocks(self, x: Tensor, grid: tuple[int, int, int], timestep: Tensor, *rest: Any) -> Tensor:
        """Run every block as ``block(x, *rest, call)``; x (B, N, C) over `grid`, timestep (B,), (B, T) or (B, N).

        Every block gets a `Call` of its own that nobody changes afterwards, so a checkpointed block is recomputed with
        what its forward saw, whatever ran in between.
        """
        if not traced():
            self.require(Grid(*grid))
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            call = Call(grid=grid, timestep=timestep, step=self._step, branch=self._branch, state=self._state_of(layer))
            x = checkpoint(block, x, *rest, call, use_reentrant=False) if again else block(x, *rest, call)
        return x

    def enable_gradient_checkpointing(self) -> None:
        """Keep one tensor per block for the backward and compute the block a second time there."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def chunk_ffn(self, tokens: int | None) -> None:
        """Send `tokens` tokens at a time through every feed-forward; None means all at once.

        Raises UsageError for a feed-forward that mixes tokens, which cannot be cut.
        """
        if tokens is not None and tokens < 1:
            raise UsageError(f"a chunk has at least one token, got {tokens}")
        if tokens is not None and any(isinstance(getattr(block, "ffn", None), GluMbConv) for block in self.blocks):
            raise UsageError("ffn glumbconv mixes a token with its neighbours on the grid: it takes no chunks")
        for block in self.blocks:
            block.ffn_chunk = tokens  # type: ignore[assignment]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters (of the first floating-point one)."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _ranges(layers: list[int]) -> str:
    """Layer numbers as recipes write them: ``0-3,7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)
