"""Uninitialised memory made visible: inside a package, `torch.empty` and its kin return NaN.

Memory that was never written usually holds zeros or yesterday's right answer, so a test passes by luck. With NaN in it,
every read of an uninitialised value fails.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

_FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
_METHODS = ("new_empty", "new_empty_strided")


def _inside(packages: Sequence[str]) -> bool:
    """Whether the caller of the patched function lives in one of the packages (or is their test's own file)."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return any(name == package or name.startswith(package + ".") for package in packages)


def _filled(tensor: Tensor) -> Tensor:
    if tensor.device.type != "meta" and (tensor.is_floating_point() or tensor.is_complex()):
        with torch.no_grad():
            tensor.fill_(float("nan"))
    return tensor


def _poisoned(original: Callable[..., Tensor], packages: Sequence[str]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        # a compiler traces the original; `out=` is the caller's own memory
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _inside(packages):
            return original(*args, **kwargs)
        return _filled(original(*args, **kwargs))

    return make


def _poisoned_to_empty(original: Callable[..., nn.Module], packages: Sequence[str]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def to_empty(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        inside = _inside(packages)
        module = original(self, *args, **kwargs)
        if inside:
            for tensor in (*module.parameters(), *module.buffers()):
                _filled(tensor.detach())
        return module

    return to_empty


@contextmanager
def poisoned_memory(*packages: str) -> Iterator[None]:
    """Within the block, memory that code of `packages` leaves uninitialised holds NaN (``ultrazoo`` if none is named)."""
    packages = packages or ("ultrazoo",)
    # ``with torch.device(…)`` and the compiler look functions up in tables made once, at first use or import: they must
    # hold the originals
    import torch._dynamo

    _device_constructors()
    saved: list[tuple[Any, str, Any]] = [(torch, name, getattr(torch, name)) for name in _FUNCTIONS]
    saved += [(Tensor, name, getattr(Tensor, name)) for name in _METHODS]
    for owner, name, original in saved:
        setattr(owner, name, _poisoned(original, packages))
    saved.append((nn.Module, "to_empty", nn.Module.to_empty))
    nn.Module.to_empty = _poisoned_to_empty(nn.Module.to_empty, packages)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


@contextmanager
def restored_state(seed: int = 0) -> Iterator[None]:
    """Seeds torch's generator for the block; puts generator, default dtype, gradients and threads back afterwards."""
    generator = torch.get_rng_state()
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(generator)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
