"""What a recipe changed in a model of another library: held by the model under one attribute, undone by `uninstall`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UsageError, listed
from .layers import traced
from .session import Session

if TYPE_CHECKING:
    from .adapted import AdaptedSpec
    from .adapter import Installed

MARK = "ultrazoo"
"""Attribute under which an adapted model holds its `Placed`."""

_LENT = ("session", "select", "deselect", "reset_state", "cache_context", MARK)


class Placed:
    """What was put into one model: our processors by path, and what stood there. Subclasses say how both are put in place.

    `replaced` says what puts others in our place, for an error message.
    """

    replaced: str = "something else"

    def __init__(self, installed: Installed, made: dict[str, Any], stock: dict[str, Any]):
        self.installed, self.made, self.stock = installed, made, stock
        self.handles: list[Any] = []

    def holds(self, attn: nn.Module, ours: Any) -> bool:
        """Whether `attn` still runs `ours`."""
        raise TypeError(f"{type(self).__name__} does not say what an attention runs")

    def put_back(self, attn: nn.Module, stock: Any) -> None:
        """Give `attn` what stood there before."""
        raise TypeError(f"{type(self).__name__} does not put back")

    def tidy(self, model: nn.Module) -> None:
        """Whatever else is to be undone."""

    def require_ours(self, model: nn.Module) -> None:
        """Raise UsageError where somebody put something else in place of ours. Not while a graph is traced."""
        if traced():
            return
        gone = [path for path, ours in self.made.items() if not self.holds(model.get_submodule(path), ours)]
        if gone:
            raise UsageError(
                f"{listed(gone[:3])}: the recipe's processor was replaced ({self.replaced}); ultrazoo.remove(model), do it "
                "again, then apply"
            )

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the model begins (forward pre-hook with keywords)."""
        self.require_ours(model)
        self.installed.enter(model, args, kwargs)


def inside(model: nn.Module) -> nn.Module:
    """The model itself, without what torch.compile or peft put around it."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__module__.startswith("peft.") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner  # type: ignore[no-any-return]


def changed(spec: AdaptedSpec, session: Session) -> Iterator[tuple[int, str, str]]:
    """Layer number, group and module path of every attention that the session replaces; `original` is left alone."""
    groups = spec.adapter().paths(spec.settings())
    where = [(group, path) for group, paths in groups.items() for path in paths]
    for layer, (group, path) in enumerate(where):
        if session.specs[layer].name != "original" or session.alternatives[layer]:
            yield layer, group, path


def require_free(model: nn.Module) -> None:
    """Raise UsageError for a model that holds a recipe already."""
    if MARK in vars(model):
        raise UsageError(f"this {type(model).__name__} runs a recipe already; ultrazoo.remove(model) first")


def lend(model: nn.Module, session: Session, placed: Placed) -> None:
    """Give the model `session`, `select`, `deselect` and `reset_state`, as native backbones have them."""
    vars(model).update(
        {
            "session": session,
            "select": session.select,
            "deselect": session.deselect,
            "reset_state": session.reset_state,
            MARK: placed,
        }
    )


def uninstall(model: nn.Module) -> list[str]:
    """Undo what `install` did: attentions, hooks and attributes as they were. Returns the paths restored.

    What somebody put in place of ours meanwhile stays.
    """
    placed: Placed | None = vars(model).get(MARK)
    if placed is None:
        raise UsageError(f"this {type(model).__name__} runs no recipe: there is nothing to remove")
    for path, held in placed.stock.items():
        attn = model.get_submodule(path)
        if placed.holds(attn, placed.made[path]):
            placed.put_back(attn, held)
    placed.tidy(model)
    for handle in placed.handles:
        handle.remove()
    placed.installed.forget(model)
    for name in (*_LENT, "plan", "origin"):
        vars(model).pop(name, None)
    return list(placed.stock)
