"""FreeSwim (arXiv:2511.14712): every query sees all frames and as many rows and columns as half the training grid, both ways."""

from __future__ import annotations

import math

from torch import Tensor

from ultrazoo.testing import Case, plain

from .masked import masked, product_mask


def shifted(length: int, reach: int) -> list[list[int]]:
    """``2*reach + 1`` neighbours of every token; at a border the window moves inwards. A shorter axis is seen whole."""
    if length < 2 * reach + 1:
        return [list(range(length))] * length
    rows = []
    for token in range(length):
        start = min(max(token - reach, 0), length - (2 * reach + 1))
        rows.append(list(range(start, start + 2 * reach + 1)))
    return rows


def freeswim(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention; scores are scaled by ``sqrt(log_n(2n) / D)``, n the tokens of a training frame."""
    options = plain(case.spec)
    frames, (height, width) = case.grid[0], options["trained"]
    axes = [[list(range(frames))] * frames, shifted(case.grid[1], height // 2), shifted(case.grid[2], width // 2)]
    scale = None
    if options["scaled"]:
        n = height * width
        scale = math.sqrt(math.log(2 * n, n) / case.site.head_dim)
    return masked(case, product_mask(axes), scale)
