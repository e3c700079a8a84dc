"""The contract between an attention block and the model around it.

The **host** is the backbone's side: its projections, q/k norms, rotary embedding and output projection, with the
pretrained weights. It comes at call time, so a block owns only its extra parameters. Everything is token-major:
q, k, v are (B, n, heads, D).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels import exporting_to
from ..ops.graphs import followed
from ..spec import AttentionSpec, Segment, Site, Traits
from .checks import check_call, check_extra, check_inputs, check_wanted

__all__ = ["Attention", "Call", "Extra", "Host", "Positions", "export_form", "grid_positions", "refuse_segments"]


class Positions(NamedTuple):
    """Coordinates of grid tokens, one 1-D float tensor per axis: (T,), (H,), (W,). May be fractional.

    `rule` says how a rotary embedding stretches beyond the sizes it was trained at (``none``, ``interpolate``, ``ntk``,
    ``yarn``), `extent` how many positions each axis has.
    """

    t: Tensor
    h: Tensor
    w: Tensor
    rule: str = "none"
    extent: tuple[int, int, int] | None = None


class Host(Protocol):
    """What an attention may ask of the model around it."""

    def project(self, x: Tensor, which: str) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Raw projections of x (B, n, C): `which` is ``"q"``, ``"k"`` or ``"v"`` → (B, n, width); ``"qkv"`` → all
        three, in one matmul where the host's are fused."""

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Norm, rotate and split raw (B, n, width) tensors into (B, n, heads, D), in the host's own order.

        `positions` are those of q and, unless `key_positions` is given, of k. None stays None. A host without rotary
        embedding ignores positions.
        """

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        """Apply the rotary embedding to (B, n, heads, D); the identity where the host has none."""

    def out(self, y: Tensor) -> Tensor:
        """Output projection: (B, n, heads*D) → (B, n, C)."""


@dataclass
class Extra:
    """Tokens without a place on the grid, already normed, rotated and split: q, k, v (B, M, heads, D).

    `key_mask` (B, M) bool, True where the token is real. `segments` describe the M tokens in order. Raises UsageError for
    tensors, a mask or segments that do not fit each other.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if not followed():
            check_extra(self)


@dataclass
class Call:
    """Everything about one call that is not the hidden states.

    `timestep` is on the 0..1000 scale, (B,), (B, T) or (B, N). `key_valid` (B, N) bool is True where a grid token is real.
    `step` is (index, count) of the sampler, from 0, `branch` the guidance branch (plain Python). `state` is a dict made by the
    model for whatever a mechanism keeps between calls, None when nothing may be kept. Raises UsageError for a grid that is
    not three positive integers, and for a mask, timestep or step of the wrong kind.
    """

    grid: tuple[int, int, int]
    timestep: Tensor | None = None
    extra: Extra | None = None
    key_valid: Tensor | None = None
    step: tuple[int, int] | None = None
    branch: str | None = None
    state: dict[Any, Any] | None = None

    def __post_init__(self) -> None:
        if not followed():
            check_call(self)


class Attention(nn.Module):
    """Base class of attention blocks: hidden states (B, N, C) → (B, N, C) over a grid, through the host.

    With `call.extra` the result is ``(y, y_extra)``, where y_extra (B, M, heads*D) has not been through an output
    projection: the tokens' owner has its own.

    `form` is ``"eager"`` or an export target; `export_form` sets it. Shapes are checked in front of every subclass's
    forward, which may rely on them; what does not fit raises UsageError.
    """

    form: str = "eager"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            cls.forward = _checked(cls.forward)  # type: ignore[method-assign]

    def __init__(self, spec: AttentionSpec, site: Site):
        super().__init__()
        self.spec = spec
        self.site = site

    @functools.cached_property
    def traits(self) -> Traits:
        """What the design needs and takes."""
        return self.spec.traits()

    @property
    def traced(self) -> bool:
        """Must sizes be taken as symbolic? Then layouts use their index form."""
        return self.form != "eager" or torch.compiler.is_exporting() or torch.jit.is_tracing()

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} has no forward")

    def initial_values(self) -> dict[str, Any]:
        """Initial values of this module's own parameters by name (see `ops.init`); those left out start as torch does."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.spec.name}, layer={self.site.layer}"


def _checked(forward: Any) -> Any:
    """`forward`, after a look at what it is given."""

    @functools.wraps(forward)
    def checked(self: Attention, x: Tensor, host: Host, call: Call) -> Any:
        if not followed():
            check_inputs(self.spec.name, self.site, x, call)
            check_wanted(self.spec.name, self.traits, call)
        return forward(self, x, host, call)

    return checked


@contextlib.contextmanager
def export_form(model: nn.Module, target: str) -> Iterator[nn.Module]:
    """Make every attention inside `model` use its exportable form inside the ``with`` block; exact at every size too.

    Raises UsageError for a design that cannot be exported to `target`, naming it.
    """
    blocks = [module for module in model.modules() if isinstance(module, Attention)]
    for block in blocks:
        traits = block.spec.traits()
        if target not in traits.export:
            why = f": {traits.notes}" if traits.notes else ""
            raise UsageError(
                f"attention {block.spec.name!r} (layer {block.site.layer}) does not export to {target}{why}"
            )
    before = [block.form for block in blocks]
    try:
        for block in blocks:
            block.form = target
        with exporting_to(target):
            yield model
    finally:
        for block, form in zip(blocks, before, strict=True):
            block.form = form


def grid_positions(grid: Sequence[int], device: torch.device | None = None) -> Positions:
    """Integer coordinates of every token of the grid, per axis."""
    t, h, w = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    return Positions(t, h, w)


def refuse_segments(name: str, extra: Extra) -> None:
    """Raise UsageError for policies that only a block-sparse design can honour."""
    for segment in extra.segments:
        if segment.rows != "dense" or segment.keys != "always":
            raise UsageError(
                f"attention {name!r} gives extra tokens dense rows and keys seen by all; segment {segment.kind!r} asks for "
                f"rows={segment.rows}, keys={segment.keys}: use block_sparse"
            )
