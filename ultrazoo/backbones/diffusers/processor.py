"""The attention processor that runs one of our attentions inside a diffusers attention module.

It is a module, so that its attention's parameters belong to the model; it never holds the model. Subclasses write `run`
with the argument names of the stock processor: diffusers drops every keyword that it does not find there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.contract import Attention, Extra
from ...attention.scheduled import Scheduled
from ...errors import UsageError
from ...grid import Grid
from ...spec import Segment
from ..adapter import Frame, Installed, Part
from .host import STOCK, ModuleHost, Names


@dataclass
class Stream:
    """Rows beside the grid at one call: q, k, v (B, n, heads, D) ready for the scores; `key_mask` (B, n), True is real;
    `grid` where they have one of their own."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    rows: str = "dense"
    keys: str = "always"
    grid: Grid | None = None


class Processor(nn.Module):
    """``processor(attn, hidden_states, …)``: the stock call. `across`: q/k norms span all heads."""

    names: Names = STOCK
    across: bool = False

    def __init__(self, attention: Attention, layer: int, installed: Installed):
        super().__init__()
        self.attention = attention
        self.layer = layer
        self.installed = installed
        # in a tuple, so that a stock processor with weights does not become our child
        self.stock: tuple[Any, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = cls.run

        def call(self: Processor, attn: nn.Module, *args: Any, **more: Any) -> Any:
            if self._aside():
                return self.stock[0](attn, *args, **more)
            return run(self, attn, *args, **more)

        call.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
        cls.__call__ = call  # type: ignore[method-assign, assignment]

    def run(self, attn: nn.Module, hidden_states: Tensor) -> Any:
        """What the stock processor returns, from our attention."""
        raise TypeError(f"{type(self).__name__} has no run")

    @property
    def frame(self) -> Frame:
        """The facts of the forward that is running."""
        return self.installed.call(self.layer, None)[0]

    def host(self, attn: nn.Module, names: Names | None = None) -> ModuleHost:
        """`attn` as the host of this call."""
        return ModuleHost(attn, self.frame, self.attention.site, names or self.names, across=self.across)

    def attend(
        self, x: Tensor, host: Any, streams: Sequence[Stream] = (), key_valid: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Our attention over the grid's rows x (B, N, C) beside `streams`: y (B, N, C) through the host's output, and the
        raw output (B, n, heads*D) of every stream. `key_valid` (B, N): which grid tokens are real."""
        streams = [stream for stream in streams if stream.q.shape[1]]
        extra = _extra(streams, x) if streams else None
        frame, call = self.installed.call(self.layer, extra)
        if x.shape[1] != frame.tokens:
            raise UsageError(
                f"{self.installed.adapter.model}: attention of layer {self.layer} got {x.shape[1]} tokens for grid "
                f"{frame.grid} of {frame.tokens}; context parallelism and token dropping are not supported"
            )
        self._follow(x)
        call.key_valid = key_valid
        found = self.attention(x, host, call)
        if extra is None:
            return found, []
        y, rest = found
        return y, list(rest.split([stream.q.shape[1] for stream in streams], dim=1))

    def parameter(self, attn: Any, which: str, part: str) -> Part:
        """Where `attn` keeps the `part` (weight, bias) of projection `which` (q, k, v, o). Raises UsageError for a host that
        keeps no such linear."""
        # the stock path reads only the fused copy then: the others may be stale
        if which != "o" and getattr(attn, "fused_projections", False) and hasattr(attn, self.names.fused):
            return self.third(f"{self.names.fused}.{part}", which)
        name = self.names.out if which == "o" else getattr(self.names, which)
        linear = getattr(attn, name, None)
        if linear is None and which == "o":
            # the output projection is the block's own
            return Part(None)
        if linear is None:
            raise UsageError(
                f"{self.installed.adapter.model}: layer {self.layer} has no linear {name!r} that a parameter of "
                f"{self.attention.spec.name} could start as a copy of (adapt: shared and lora read no weights)"
            )
        return Part(f"{name}{'.0' if isinstance(linear, nn.ModuleList) else ''}.{part}")

    def third(self, place: str, which: str) -> Part:
        """`which` of q, k and v in a parameter at `place` that begins with the rows of all three."""
        width, index = self.attention.site.width, "qkv".index(which)
        return Part(place, rows=(index * width, (index + 1) * width))

    def _aside(self) -> bool:
        """Whether this step belongs to the model's own attention."""
        attention = self.attention
        if isinstance(attention, Scheduled):
            return attention.chosen(self.frame.step).spec.name == "original"
        return attention.spec.name == "original"

    def _follow(self, x: Tensor) -> None:
        """Offloading moves modules it knew when it was set up; ours may have come later, so they follow the data.

        Raises UsageError for parameters that were never loaded.
        """
        if torch.compiler.is_compiling():
            return
        devices = {parameter.device for parameter in self.attention.parameters()}
        if devices <= {x.device}:
            return
        if torch.device("meta") in devices:
            self._stay()
        self.attention.to(x.device)

    def _stay(self) -> None:
        """Take the attention out of accelerate's offloading, which shows a module its own parameters during its own
        forward alone; a design reads those of its parts too."""
        if any(hasattr(module, "_hf_hook") for module in self.attention.modules()):
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(self.attention, recurse=True)
        if any(parameter.is_meta for parameter in self.attention.parameters()):
            raise UsageError(f"layer {self.layer}: parameters of {self.attention.spec.name} are on the meta device")

    # what diffusers sets on every processor it finds

    @property
    def _attention_backend(self) -> None:
        return None

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        if backend is not None:
            raise UsageError(f"set_attention_backend({backend}): kernels of a recipe are chosen in it (kernel: name)")

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise UsageError("context parallelism splits the sequence anywhere; a recipe's attention needs it whole")


def _extra(streams: Sequence[Stream], x: Tensor) -> Extra:
    mask = None
    if any(stream.key_mask is not None for stream in streams):
        mask = torch.cat(
            [
                torch.ones(x.shape[0], one.q.shape[1], dtype=torch.bool, device=x.device)
                if one.key_mask is None
                else one.key_mask.bool()
                for one in streams
            ],
            dim=1,
        )
    segments = tuple(Segment(one.kind, one.q.shape[1], one.grid, one.rows, one.keys) for one in streams)  # type: ignore[arg-type]
    q, k, v = (torch.cat([getattr(one, name) for one in streams], dim=1) for name in ("q", "k", "v"))
    return Extra(q, k, v, mask, segments)


def refuse_mask(mask: Any, model: str) -> None:
    """Raise UsageError for a mask over the visual sequence, which the adapter of `model` does not take."""
    if mask is not None:
        raise UsageError(f"{model}: an attention mask over the visual tokens is not supported by this adapter")


def turned_pairs(cos: Tensor, sin: Tensor, pairing: str = "interleaved") -> Callable[[Tensor], Tensor]:
    """Rotation of (B, n, heads, D) by a model's own tables, broadcast to (…, n, 1, r), each value twice.

    `r` ≤ D channels turn, the rest pass. ``interleaved`` pairs channels 2i and 2i+1, ``halves`` i and i + r/2.
    """

    def turn(z: Tensor) -> Tensor:
        used = cos.shape[-1]
        part = z[..., :used].to(cos.dtype if cos.dtype == torch.float64 else torch.float32)
        if pairing == "interleaved":
            a, b = part.unflatten(-1, (-1, 2)).unbind(-1)
            other = torch.stack([-b, a], dim=-1).flatten(-2)
        else:
            a, b = part.chunk(2, dim=-1)
            other = torch.cat([-b, a], dim=-1)
        part = (part * cos + other * sin).to(z.dtype)
        return part if used == z.shape[-1] else torch.cat([part, z[..., used:]], dim=-1)

    return turn


def turned_complex(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Rotation of (B, n, heads, D) by a model's own complex table, broadcast to (…, n, 1, D/2)."""

    def turn(z: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).to(z.dtype)

    return turn
