"""Which attention operators torch chose while a graph ran."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """Collect the names of attention operators in `seen`; ``softmax`` where scores were a tensor of their own."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if "attention" in name or name.endswith("softmax"):
            self.seen.append(name.strip("_"))
        return func(*args, **(kwargs or {}))


_UNWATCHED: contextvars.ContextVar[bool] = contextvars.ContextVar("ultrazoo_unwatched", default=False)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside the ``with`` block `watching` watches nothing: it costs a call in Python for every operator."""
    token = _UNWATCHED.set(True)
    try:
        yield
    finally:
        _UNWATCHED.reset(token)


def watching(seen: list[str]) -> contextlib.AbstractContextManager[Any]:
    """`Watching`, or nothing inside of `unwatched`."""
    return contextlib.nullcontext() if _UNWATCHED.get() else Watching(seen)
