"""Putting our attentions into models whose attention modules have no processors: their forward is replaced.

Module names stay, so the model's own weights keep their keys; our attention becomes the child ``processor`` of the module
that it replaces. Models checkpoint block by block in ways of their own (``torch.utils.checkpoint`` around a block): the
input of a block carries the frame of its forward, and the recomputation, which gets the same tensor, reads it there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .adapter import Config, Frame, Installed
from .layers import traced
from .placed import Placed, changed, lend, require_free
from .session import Session

if TYPE_CHECKING:
    from .adapted import AdaptedSpec
    from .adapter import Adapter

TAG = "_ultrazoo_frame"
"""Attribute of a block's input: whose frame it is and which."""


class Forwards(Placed):
    """Forwards of attention modules: an attribute of the instance hides the class's method."""

    replaced = "assigning to forward does that"

    def holds(self, attn: nn.Module, ours: Any) -> bool:
        held = getattr(vars(attn).get(_place(attn)), "func", None)
        return attn._modules.get("processor") is ours and held is ours

    def put_back(self, attn: nn.Module, stock: Any) -> None:
        del vars(attn)[_place(attn)], attn._modules["processor"]
        if hasattr(attn, "_hf_hook"):
            vars(attn)[_place(attn)] = stock.__get__(attn)


def _place(attn: nn.Module) -> str:
    """The attribute that holds what runs: accelerate's offloading takes `forward` and keeps what stood there."""
    return "_old_forward" if hasattr(attn, "_hf_hook") else "forward"


class Followed(Installed):
    """`Installed` for models that checkpoint whole blocks. A subclass may `attach` elsewhere than at the model's forward."""

    def __init__(self, adapter: Adapter, config: Config, session: Session):
        super().__init__(adapter, config, session)
        self.before: list[Frame | None] = []
        self.backward = -1

    def attach(self, model: nn.Module, placed: Placed) -> Iterator[Any]:
        """Register the hooks that tell where a forward begins and ends; gives their handles."""
        yield model.register_forward_pre_hook(placed.enter, with_kwargs=True)
        yield model.register_forward_hook(self.leave, always_call=True)

    def begin(self, frame: Frame) -> None:
        super().begin(frame)
        self.before.clear()
        if not traced():
            self.backward = _backward()

    def block_begins(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block runs (forward pre-hook with keywords): in a forward its input is marked, in a recomputation read."""
        if traced():
            return
        x = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if x is None:
            raise UsageError(f"{self.adapter.model}: a block was called without a tensor")
        self.before.append(self.frame)
        owner, frame = getattr(x, TAG, (None, None))
        if _backward() == self.backward:
            if torch.is_grad_enabled() and self.frame is not None:
                # one tensor in two forwards of different frames tells nothing
                alike = owner is None or (owner is self and _alike(frame, self.frame))
                setattr(x, TAG, (self, self.frame if alike else None))
        elif owner is self and frame is not None:
            # run again by a backward that the forward was no part of
            self.frame = frame
        else:
            raise UsageError(
                f"{self.adapter.model}: a block is run again in a backward, and its input does not say for which forward; "
                "checkpoint each block by itself with use_reentrant=False"
            )

    def block_ends(self, *_: Any) -> None:
        """A block is done, well or not (forward hook)."""
        if not traced() and self.before:
            self.frame = self.before.pop()


def _backward() -> int:
    """Which backward is running; -1: none."""
    return torch._C._current_graph_task_id()


def _alike(one: Frame | None, other: Frame) -> bool:
    return one is not None and one.grid == other.grid and one.timestep is other.timestep


def install(model: nn.Module, spec: AdaptedSpec, session: Session, follow: type[Followed] = Followed) -> None:
    """Replace the forward of the visual self-attentions, layer by layer; `original` leaves a layer untouched.

    A processor is called as ``processor(attn, …)`` with the arguments of the module's own forward. Raises UsageError for a
    model that holds a recipe already, or a module whose forward somebody else replaced.
    """
    require_free(model)
    adapter = spec.adapter()
    installed = follow(adapter, spec.settings(), session)
    placed = Forwards(installed, {}, {})
    for layer, group, path in changed(spec, session):
        attn = model.get_submodule(path)
        runs = getattr(attn, _place(attn))
        if getattr(runs, "__func__", None) is not type(attn).forward or hasattr(attn, "processor"):
            raise UsageError(f"{path} does not run its class's forward; somebody replaced it: apply the recipe first")
        placed.made[path] = adapter.processor(group)(session.attention_of(layer), layer, installed)
        placed.made[path].stock = (type(attn).forward,)
        placed.stock[path] = type(attn).forward
    for path, processor in placed.made.items():
        attn = model.get_submodule(path)
        processor.train(model.training)
        attn.add_module("processor", processor)
        vars(attn)[_place(attn)] = functools.partial(processor, attn)
    placed.handles += installed.attach(model, placed)
    for path in {adapter.block(path) for path in placed.made}:
        block = model.get_submodule(path)
        placed.handles += [
            block.register_forward_pre_hook(installed.block_begins, with_kwargs=True),
            block.register_forward_hook(installed.block_ends, always_call=True),
        ]
    lend(model, session, placed)
