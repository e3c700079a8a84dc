"""Sparse VideoGen in fp64: per sample and head a band in frame order or in place order, whichever misses less on sampled rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, plain, scores

from .grouped_tokens import answer, heads_of


def place_order(grid: tuple[int, int, int]) -> list[int]:
    """All frames of one place, then the next place."""
    size = grid[1] * grid[2]
    return [t * size + place for place in range(size) for t in range(grid[0])]


def band(grid: tuple[int, int, int], order: list[int], options: dict[str, Any]) -> Tensor:
    """Bool (N, N): blocks of the order within the band's width, and those of the first frame's number of tokens."""
    tokens, block = len(order), options["block"]
    reach = math.ceil(tokens * (1 - math.sqrt(1 - options["density"])) / block - 1e-9)
    at = {token: i for i, token in enumerate(order)}
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    frame = grid[1] * grid[2] * options["sink"]
    for a in range(tokens):
        for b in range(tokens):
            i, j = at[a] // block, at[b] // block
            mask[a, b] = abs(i - j) <= reach or j * block < frame
    return mask


def sampled_rows(tokens: int, count: int) -> list[int]:
    """Evenly spaced, from the middle of each stretch."""
    count = min(count, tokens)
    return [int((i + 0.5) * tokens / count) for i in range(count)]


def sparse_videogen(case: Case) -> Any:
    options = plain(case.spec)
    q, k, v, real = heads_of(case)
    tokens = case.x.shape[1]
    more = torch.ones(tokens, k.shape[1] - tokens, dtype=torch.bool)
    orders = [list(range(tokens)), place_order(case.grid)]
    masks = [torch.cat([band(case.grid, order, options), more], dim=1) for order in orders]
    rows = sampled_rows(tokens, options["rows"])
    keys = real[:, None, None]
    wanted = attend(scores(q[:, rows], k, keys), v)
    found = [attend(scores(q[:, rows], k, keys & mask[rows]), v) for mask in masks]
    outputs = [attend(scores(q, k, keys & mask), v) for mask in masks]
    heads, size = q.shape[2], q.shape[3]
    y = outputs[0].clone()
    for b in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            counts = real[b, rows, None]
            missed = [float(((one - wanted)[b, :, part].detach().square() * counts).sum()) for one in found]
            if missed[1] < missed[0]:
                y[b, :, part] = outputs[1][b, :, part]
    return answer(case, y)
