"""Which attention operators torch chose while a graph ran."""

from __future__ import annotations

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
