"""The token grid: the one place that knows what (T, H, W) means.

Tokens are t-major: token ``n = (t*H + y)*W + x``. An image is a grid with T = 1.
"""

from __future__ import annotations

from typing import NamedTuple


class Grid(NamedTuple):
    """Tokens along time, height and width after patchify."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"({self.t}, {self.h}, {self.w})"


AXES = ("t", "h", "w")


def as_grid(value: tuple[int, ...] | list[int]) -> Grid:
    """A grid from (H, W), an image, or (T, H, W); raises ValueError for anything else."""
    sizes = tuple(value)
    if len(sizes) == 2:
        sizes = (1, *sizes)
    if len(sizes) != 3 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ValueError(f"a grid is (H, W) or (T, H, W) of positive integers, got {value!r}")
    return Grid(*sizes)


def per_axis(value: int | tuple[int, ...], whole: int = 1) -> tuple[int, int, int]:
    """Spread an option over (T, H, W): one number or two mean (H, W) with T = `whole`, three mean (T, H, W)."""
    if isinstance(value, int):
        return (whole, value, value)
    if len(value) == 2:
        return (whole, value[0], value[1])
    if len(value) == 3:
        return (value[0], value[1], value[2])
    raise ValueError(f"expected 1, 2 or 3 numbers, got {value!r}")
