"""Rotary tables: coordinates read back from one that the caller made, for models that are handed cosines and sines alone;
and grids that are longer than a model's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import Problem
from ...grid import Grid


def coordinates(cos: Tensor, sin: Tensor, base: float) -> Tensor:
    """Positions (n,) behind one axis of a table (n, c), channels in pairs, frequencies ``base**(-2i/c)``: fp64.

    The slowest pair tells the position roughly, without a full turn (positions below ``pi * base**((c-2)/c)``); every
    faster one tells it more exactly, whole turns being known from the one before.
    """
    cos, sin = cos[:, 0::2].double(), sin[:, 0::2].double()
    angles = torch.atan2(sin, cos)
    pairs = angles.shape[1]
    found = torch.zeros(angles.shape[0], dtype=torch.float64, device=angles.device)
    for pair in reversed(range(pairs)):
        speed = base ** (-pair / pairs)
        turns = torch.round((found * speed - angles[:, pair]) / (2 * math.pi))
        if pair == pairs - 1:
            turns = torch.zeros_like(turns)
        found = (angles[:, pair] + 2 * math.pi * turns) / speed
    return found


def too_long(grid: Grid, places: int, setting: str = "") -> list[Problem]:
    """A problem where an axis of `grid` is longer than the model's tables of `places` positions, which `setting` makes."""
    if max(grid) <= places:
        return []
    rule = f"the model's rotary tables hold {places} positions on each axis, the grid is {grid}"
    longer = f", or write {max(grid)}" if setting else ""
    return [Problem(f"config.{setting}" if setting else "", rule, f"give a smaller video{longer}")]
