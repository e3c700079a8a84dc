"""What every native backbone has: attentions built from specs, sampling steps, state, size checks, checkpointing.

A subclass makes its layers, each with the attention that `attention_of` gives it, and runs them with `run_blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Problem, UsageError
from ..grid import Grid
from ..ops.graphs import made_once
from ..spec import AttentionSpec, BackboneSpec
from .ffn import GluMbConv
from .layers import traced
from .session import Session, Steps

__all__ = ["Backbone", "Steps"]


class Backbone(nn.Module):
    """A diffusion transformer whose layer i runs ``attention[i]`` over a token grid.

    `grid` is the size the attentions are built and first checked for; a forward at another size checks again, once.
    `plan` is set by whoever builds from a recipe. Raises SiteError with the problems of every layer, UsageError for a
    wrong number of layers.
    """

    blocks: nn.ModuleList

    def __init__(self, spec: BackboneSpec, attention: Sequence[AttentionSpec], grid: Grid, steps: Steps = ()):
        super().__init__()
        self.session = Session(spec, attention, grid, steps)
        self.spec = spec
        self.plan: Any = None
        self.gradient_checkpointing = False

    def problems_at(self, grid: Grid) -> list[Problem]:
        """Everything wrong with the attentions at `grid`; one problem of several layers is listed once."""
        return self.session.problems_at(grid)

    def require(self, grid: Grid) -> None:
        """Raise SiteError unless every attention can run at `grid`."""
        self.session.require(grid)

    def select(self, step: int, count: int, branch: str | None = None) -> None:
        """Say which of `count` sampling steps (0-based) the next forwards belong to, and which guidance branch.

        Step 0 begins a clip: whatever the attentions kept for that branch is dropped.
        """
        self.session.select(step, count, branch)

    def deselect(self) -> None:
        """Forget the step: forwards belong to no sampling run any more."""
        self.session.deselect()

    def reset_state(self) -> None:
        """Drop everything that attentions kept between calls, in every guidance branch."""
        self.session.reset_state()

    def attention_of(self, layer: int) -> nn.Module:
        """A fresh attention for `layer`, with its alternatives at other sampling steps where it has some."""
        return self.session.attention_of(layer)

    def run_blocks(self, x: Tensor, grid: tuple[int, int, int], timestep: Tensor, *rest: Any) -> Tensor:
        """Run every block as ``block(x, *rest, call)``; x (B, N, C) over `grid`, timestep (B,), (B, T) or (B, N)."""
        if not traced():
            self.require(Grid(*grid))
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        with made_once():
            for layer, block in enumerate(self.blocks):
                call = self.session.call(layer, grid, timestep)
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
