"""Does a tensor of queries by keys exist when the file runs, and how large a grid can be before it fills the memory?

That is the runtime's affair: torch's flash kernels hold none, onnxruntime's Attention operator on a CPU holds that of a
whole call, over batch (and windows), heads, queries and keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from .sizes import Bounds, Sizes

FLASH = ("flash", "efficient", "cudnn", "fused")
"""Words in the names of torch's attention operators that hold no scores."""


def memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_flash(facts: Mapping[str, Any], operators: Mapping[str, int]) -> bool | None:
    """Does all attention that a runtime tells of in its `facts` do without a tensor of scores? None where it tells of none.

    A compiler that calls fewer attention operators than the program has (`operators`) has written the others out.
    """
    kernels = facts["kernels"]
    if not kernels:
        return None
    due = sum(count for name, count in operators.items() if name.startswith("scaled_dot_product"))
    whole = facts.get("attention_calls", due) >= due
    return whole and all(any(word in name for word in FLASH) for name in kernels)


def room(
    scores_at: Callable[[Sizes], int], bounds: Bounds, sizes: Sizes, weight_bytes: int, memory: int
) -> dict[str, Any]:
    """How the scores of a runtime that holds them fit `memory` beside the weights: at `sizes`, and up to which grid of the
    same shape, T as it is; None as the grid where not even the smallest fits, or where none is too large."""
    free = memory - weight_bytes
    fits = scores_at(sizes) <= free
    return {"memory_bytes": memory, "fits": fits, "largest_grid": _largest(scores_at, bounds, sizes, free)}


def _largest(scores_at: Callable[[Sizes], int], bounds: Bounds, sizes: Sizes, free: int) -> list[int] | None:
    sides = [axis for axis in "hw" if axis in bounds and bounds[axis].open]
    if not sides:
        return None
    longest = max(sizes[axis] for axis in sides)
    most = min(bounds[axis].high * longest // sizes[axis] for axis in sides)

    def at(side: int) -> Mapping[str, int]:
        grown = {axis: max(bounds[axis].low, round(sizes[axis] * side / longest)) for axis in sides}
        return {**sizes, **grown}

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if scores_at(at(middle)) <= free else (low, middle)
    if low in (0, most):
        return None
    found = at(low)
    return [found.get("t", 1), found["h"], found["w"]]
