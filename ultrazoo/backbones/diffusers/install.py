"""Putting our attentions into a diffusers model: processors in place of the stock ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import UsageError
from ..adapter import Installed
from ..placed import Placed, changed, lend, require_free
from ..session import Session
from .processor import Processor

if TYPE_CHECKING:
    from ..adapted import AdaptedSpec


class Processors(Placed):
    """Processors of diffusers attention modules."""

    replaced = "fuse_qkv_projections of some classes and set_attn_processor do that"

    def holds(self, attn: nn.Module, ours: Any) -> bool:
        return attn.processor is ours

    def put_back(self, attn: nn.Module, stock: Any) -> None:
        attn.set_processor(stock)  # type: ignore[operator]

    def tidy(self, model: nn.Module) -> None:
        # what unfuse_qkv_projections of some classes puts back
        kept: dict[str, Any] = getattr(model, "original_attn_processors", None) or {}
        for name, processor in kept.items():
            if isinstance(processor, Processor):
                kept[name] = processor.stock[0]


def install(model: nn.Module, spec: AdaptedSpec, session: Session) -> None:
    """Replace the processors of the visual self-attentions, layer by layer; `original` leaves a layer untouched.

    Raises UsageError for a model that holds a recipe already, or foreign processors where ours would go.
    """
    require_free(model)
    adapter = spec.adapter()
    installed = Installed(adapter, spec.settings(), session)
    placed = Processors(installed, {}, {})
    for layer, group, path in changed(spec, session):
        held: Any = model.get_submodule(path).get_processor()  # type: ignore[operator]
        if not type(held).__module__.startswith(type(model).__module__.partition(".")[0]):
            raise UsageError(f"{path} has the foreign processor {type(held).__name__}; restore the stock one first")
        placed.made[path] = adapter.processor(group)(session.attention_of(layer), layer, installed)
        placed.made[path].stock = (held,)
        placed.stock[path] = held
    for path, processor in placed.made.items():
        processor.train(model.training)
        model.get_submodule(path).set_processor(processor)  # type: ignore[operator]
    placed.handles += [
        model.register_forward_pre_hook(placed.enter, with_kwargs=True),
        model.register_forward_hook(installed.leave, always_call=True),
    ]
    lend(model, session, placed)
    if hasattr(type(model), "cache_context"):
        vars(model)["cache_context"] = _Announcing(model, session)


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
