"""The places of a model that hold numbers, and what goes into each: a value of the checkpoint or a fresh one.

A model is made on the meta device, where it has every name and shape and no memory. Its slots are then given one tensor
at a time, to be put into the model or written to a file. A fresh value depends on the recipe's seed and the parameter's
own name, on nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.contract import Attention
from ..errors import UltrazooError
from ..ops import init
from .copies import Held, copied
from .match import Match
from .reader import Checkpoint
from .tensors import Entry


class Unfilled(TorchFunctionMode):
    """While it is active, filling a tensor of the meta device with random numbers does nothing.

    torch's own way to do so imports its compiler, which takes seconds.
    """

    FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.log_normal_, Tensor.exponential_})

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self.FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer. `places` are the (module, name) pairs that hold it: several where it is shared."""

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    saved: bool

    def entry(self, dtype: torch.dtype | None = None) -> Entry:
        return Entry(self.name, self.shape, self.cast(dtype))

    def cast(self, dtype: torch.dtype | None) -> torch.dtype:
        """The type this slot has in a model of `dtype`: only floating-point numbers change."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype

    def put(self, tensor: Tensor) -> None:
        """Put `tensor` into the model in place of what is there."""
        module, name = self.places[0]
        held = getattr(module, name)
        value = nn.Parameter(tensor, requires_grad=held.requires_grad) if self.parameter else tensor
        for module, name in self.places:
            if self.parameter:
                module._parameters[name] = value  # type: ignore[assignment]
            else:
                module._buffers[name] = value

    def get(self) -> Tensor:
        module, name = self.places[0]
        return getattr(module, name)  # type: ignore[no-any-return]


def slots_of(model: nn.Module) -> list[Slot]:
    """Every parameter and buffer in the order of the state dict; one that is shared stands once, under its first name."""
    found: dict[int, tuple[str, Tensor, bool, bool, list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        held = [(name, tensor, True, True) for name, tensor in module._parameters.items()]
        held += [
            (name, tensor, False, name not in module._non_persistent_buffers_set)
            for name, tensor in module._buffers.items()
        ]
        for name, tensor, parameter, saved in held:
            if tensor is None:
                continue
            row = found.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor, parameter, saved, []))
            row[4].append((module, name))
    return [
        Slot(name, tuple(places), tuple(tensor.shape), tensor.dtype, parameter, saved)
        for name, tensor, parameter, saved, places in found.values()
    ]


def attention_paths(model: nn.Module) -> list[str]:
    """Module paths of the outermost attention blocks: what is below them is not the backbone's own."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Attention) and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def seeded(seed: int, name: str) -> torch.Generator:
    """The CPU generator of the parameter `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class Values:
    """What goes into each slot of `model`: from `checkpoint` where `match` says so, else fresh from `seed`.

    Floating-point slots get `dtype`; None keeps the type of the checkpoint, or of the slot where the value is fresh.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int,
        dtype: torch.dtype | None,
        match: Match | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        self._model = model
        self.slots = slots_of(model)
        self.seed = seed
        self.dtype = dtype
        self._reused = match.reused if match is not None else {}
        self._checkpoint = checkpoint
        self._by_name = {slot.name: slot for slot in self.slots}
        self._attentions = attention_paths(model)
        self._by_place = {(id(module), name): slot for slot in self.slots for module, name in slot.places}

    def entry(self, slot: Slot) -> Entry:
        """The shape and type of what `tensor` gives for `slot`."""
        if self.dtype is None and slot.name in self._reused:
            assert self._checkpoint is not None
            return Entry(slot.name, slot.shape, self._checkpoint.entries[self._reused[slot.name]].dtype)
        if not slot.parameter and not slot.get().is_meta:
            return slot.entry()
        return slot.entry(self.dtype)

    def tensor(self, slot: Slot) -> Tensor:
        """The value of `slot` on the CPU; it may share memory with the checkpoint's file."""
        dtype = self.entry(slot).dtype
        if slot.name in self._reused:
            assert self._checkpoint is not None
            return self._checkpoint.tensor(self._reused[slot.name]).to(dtype)
        if not slot.parameter and not slot.get().is_meta:
            # a table that its module made
            return slot.get()
        module, name = slot.places[0]
        try:
            value = init.value_of(module, name)
            if isinstance(value, init.Copy):
                path = next(path for path in self._attentions if slot.name.startswith(f"{path}."))
                return copied(self._model, path, slot.name, value, slot.shape, self._read).to(dtype)
            return init.make(value, slot.shape, seeded(self.seed, slot.name)).to(dtype)
        except ValueError as error:
            raise UltrazooError(f"{slot.name}: {error}") from error

    def borrows(self, name: str) -> bool:
        """Whether the tensor of this slot may be the checkpoint's own memory: taken from there and not cast."""
        if name not in self._reused:
            return False
        assert self._checkpoint is not None
        return self.entry(self._by_name[name]).dtype == self._checkpoint.entries[self._reused[name]].dtype

    def _read(self, held: Held) -> Tensor | None:
        """The value of the host's parameter that a slot starts as: reused or fresh, as the host's own."""
        slot = self._by_place.get((id(held.module), held.name))
        return None if slot is None else self.tensor(slot)


def stream(slots: Iterable[Slot], make: Callable[[Slot], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each slot in order, the next few made ahead in threads.

    At most one tensor more than there are threads is alive: memory stays bounded by the largest tensors.
    """
    threads = max(1, min(4, os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ultrazoo-weights")
    waiting: deque[tuple[str, Future[Tensor]]] = deque()
    try:
        for slot in slots:
            waiting.append((slot.name, pool.submit(make, slot)))
            if len(waiting) > threads:
                name, future = waiting.popleft()
                yield name, future.result()
                del future
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result()
            del future
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
