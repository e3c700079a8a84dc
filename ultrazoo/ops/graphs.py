"""Is a compiler following, and marks of functions for it, made without importing it.

torch's own decorators import the compiler where they are written, which took a plan twice as long as importing torch does.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def followed() -> bool:
    """Does a compiler, an exporter or a tracer follow this code? Then sizes may be symbolic."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def longer(one: Any, other: Any) -> Any:
    """The larger of two sizes: numbers, symbols where an exporter follows, tensors of one number where a tracer does."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.maximum(*(size if isinstance(size, torch.Tensor) else torch.tensor(size) for size in (one, other)))
    return torch.sym_max(one, other)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Never compiled: `torch.compiler.disable`, applied once the compiler is there."""
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Called while a graph is made, and its answer is a constant there: `torch.compiler.assume_constant_result`."""
    # all that torch's own does; a test holds the two together
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_MADE: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("ultrazoo_made_of_sizes", default=None)


@contextlib.contextmanager
def made_once() -> Iterator[None]:
    """Inside the ``with`` block, where an exporter follows, functions that are `of_sizes` make each result once: layers of
    a model share index arrays and rotary tables, which halves what is traced. One forward, one block."""
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        yield
        return
    token = _MADE.set({})
    try:
        yield
    finally:
        _MADE.reset(token)


def of_sizes(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose result follows from its arguments alone, tensors by identity; see `made_once`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        made = None if torch.compiler.is_dynamo_compiling() else _MADE.get()
        if made is None:
            return function(*args, **kwargs)
        key = (function, _key(args), _key(tuple(sorted(kwargs.items()))))
        if key not in made:
            # arguments are kept too, so that an identity stays one
            made[key] = function(*args, **kwargs), args, kwargs
        return made[key][0]  # type: ignore[no-any-return]

    return call


def _key(value: Any) -> Any:
    """Equal for equal arguments of a call in one graph; symbolic sizes by their expression."""
    if isinstance(value, torch.SymInt):
        return ("size", str(value.node.expr))
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value))
    if isinstance(value, tuple | list):
        return tuple(_key(one) for one in value)
    return (type(value), value)
