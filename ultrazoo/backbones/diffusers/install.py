"""Putting our attentions into a diffusers model, and taking them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import UsageError, listed
from ..adapter import Installed
from ..layers import traced
from ..session import Session
from .processor import Processor

if TYPE_CHECKING:
    from ..adapted import AdaptedSpec

MARK = "ultrazoo"
"""Attribute under which an adapted model holds its `Placed`."""

_LENT = ("session", "select", "deselect", "reset_state", "cache_context", MARK)


class Placed:
    """What `install` did to one model, so that `uninstall` can undo it: processors by path, and the stock ones."""

    def __init__(self, installed: Installed, made: dict[str, Processor], stock: dict[str, Any]):
        self.installed, self.made, self.stock = installed, made, stock
        self.handles: list[Any] = []

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins. Raises UsageError where somebody put other processors in place of ours."""
        if not traced():
            gone = [path for path, ours in self.made.items() if model.get_submodule(path).processor is not ours]
            if gone:
                raise UsageError(
                    f"{listed(gone[:3])}: the recipe's processor was replaced (fuse_qkv_projections of some classes and "
                    "set_attn_processor do that); ultrazoo.remove(model), do it again, then apply"
                )
        self.installed.enter(model, args, kwargs)


def install(model: nn.Module, spec: AdaptedSpec, session: Session) -> None:
    """Replace the processors of the visual self-attentions, layer by layer; `original` leaves a layer untouched.

    The model gains `select`, `deselect`, `reset_state` and `session`, as native backbones have them. Raises UsageError
    for a model that holds a recipe already, or foreign processors where ours would go.
    """
    if MARK in vars(model):
        raise UsageError(f"this {type(model).__name__} runs a recipe already; ultrazoo.remove(model) first")
    adapter = spec.adapter()
    installed = Installed(adapter, spec.settings(), session)
    stock: dict[str, Any] = {}
    made: dict[str, Processor] = {}
    groups = adapter.paths(spec.settings())
    where = [(group, path) for group, paths in groups.items() for path in paths]
    for layer, (group, path) in enumerate(where):
        if session.specs[layer].name == "original" and not session.alternatives[layer]:
            continue
        attn = model.get_submodule(path)
        held: Any = attn.get_processor()  # type: ignore[operator]
        if not type(held).__module__.startswith(type(model).__module__.partition(".")[0]):
            raise UsageError(f"{path} has the foreign processor {type(held).__name__}; restore the stock one first")
        made[path] = adapter.processor(group)(session.attention_of(layer), layer, installed)  # type: ignore[assignment]
        made[path].stock = (held,)
        stock[path] = held
    for path, processor in made.items():
        processor.train(model.training)
        model.get_submodule(path).set_processor(processor)  # type: ignore[operator]
    placed = Placed(installed, made, stock)
    placed.handles += [
        model.register_forward_pre_hook(placed.enter, with_kwargs=True),
        model.register_forward_hook(installed.leave, always_call=True),
    ]
    vars(model).update(
        {
            "session": session,
            "select": session.select,
            "deselect": session.deselect,
            "reset_state": session.reset_state,
            MARK: placed,
        }
    )
    if hasattr(type(model), "cache_context"):
        vars(model)["cache_context"] = _Announcing(model, session)


def uninstall(model: nn.Module) -> list[str]:
    """Undo `install`: stock processors, hooks and attributes as they were. Returns the paths restored.

    A processor that somebody put in place of ours meanwhile stays.
    """
    placed: Placed | None = vars(model).get(MARK)
    if placed is None:
        raise UsageError(f"this {type(model).__name__} runs no recipe: there is nothing to remove")
    for path, held in placed.stock.items():
        attn = model.get_submodule(path)
        if attn.processor is placed.made[path]:
            attn.set_processor(held)  # type: ignore[operator]
    # what unfuse_qkv_projections of some classes puts back
    kept: dict[str, Any] = getattr(model, "original_attn_processors", None) or {}
    for name, processor in kept.items():
        if isinstance(processor, Processor):
            kept[name] = processor.stock[0]
    for handle in placed.handles:
        handle.remove()
    placed.installed.forget(model)
    for name in (*_LENT, "plan", "origin"):
        vars(model).pop(name, None)
    return list(placed.stock)


class _Announcing:
    """The model's `cache_context`, through which pipelines tell the guidance branch and, some of them, the step."""

    def __init__(self, model: nn.Module, session: Session):
        self.model, self.session = model, session

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        step, count = kwargs.get("step_index"), kwargs.get("num_inference_steps")
        with (
            type(self.model).cache_context(self.model, name, *args, **kwargs),
            self.session.announced(name, step, count),
        ):  # type: ignore[attr-defined]
            yield
