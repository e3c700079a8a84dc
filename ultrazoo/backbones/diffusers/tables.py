"""Coordinates read back from a rotary table that the caller made: for models that are handed cosines and sines alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
