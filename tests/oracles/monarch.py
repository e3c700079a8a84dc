"""MonarchRT in fp64: both factors as explicit probabilities, multiplied out to the dense matrix that they stand for.

Source: the specification of MonarchRT (arXiv 2602.12271) and its reference operator. The weight of key (f, k, l) for query
(a, i, j) is ``L[a, j, i, (f, k)] * R[a, f, k, j, l]``. Tokens that are not real, and extra tokens, follow our own rules: an
unreal token's query is zero where it stands for its row, a row of keys without a real one is left out, and extra keys
join the softmax of L.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, extra_rows, grid_of, plain


def monarch(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Every sample and head on its own."""
    options = plain(case.spec)
    places = places_of(case.grid, options)
    frames, rows, columns = (max(place[axis] for place in places) + 1 for axis in range(3))
    grid = grid_of(case.grid)
    known = torch.ones(case.x.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid

    def placed(z: Tensor) -> Tensor:
        """(B, N, …) → (B, frames * rows * columns, …); places without a token are zero, and not real."""
        out = z.new_zeros(z.shape[0], frames * rows * columns, *z.shape[2:])
        return out.index_copy(1, at, z)

    at = torch.tensor([(f * rows + y) * columns + x for f, y, x in places])
    q = placed(case.host.split(case.host.raw(case.x, "q"), "q", grid))
    k = placed(case.host.split(case.host.raw(case.x, "k"), "k", grid))
    v = placed(case.host.split(case.host.raw(case.x, "v"), "v"))
    real = placed(known)
    samples = []
    for b in range(q.shape[0]):
        heads = []
        for head in range(q.shape[2]):
            cube = (frames, rows, columns)
            more = None
            if case.extra is not None:
                mask = case.extra.key_mask
                more = (
                    case.extra.k[b, :, head],
                    case.extra.v[b, :, head],
                    torch.ones(case.extra.k.shape[1], dtype=torch.bool) if mask is None else mask[b],
                )
            parts = (q[b, :, head].reshape(*cube, -1), k[b, :, head].reshape(*cube, -1), v[b, :, head])
            heads.append(one_head(*parts, real[b].reshape(cube), more, options["iterations"]))
        samples.append(torch.cat(heads, -1))
    y = case.host.out(torch.stack(samples)[:, at])
    extra = extra_rows(case)
    return y if extra is None else (y, extra)


def places_of(grid: tuple[int, int, int], options: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(frame, row, column) of every token after sub-tiling: a tile of a frame counts as a frame of its own, and the rows of
    `f_tied` frames as rows of one. Tiles are as many as asked for or fewer, all but the last of an axis equally long."""
    t, h, w = grid
    height, width = math.ceil(h / options["h_reduce"]), math.ceil(w / options["w_reduce"])
    tied = options["f_tied"]
    found = []
    for time in range(t):
        for y in range(h):
            for x in range(w):
                tile = (time // tied, y // height, x // width)
                found.append((tile, time % tied * height + y % height, x % width))
    numbers = {tile: n for n, tile in enumerate(sorted({tile for tile, _, _ in found}))}
    return [(numbers[tile], row, column) for tile, row, column in found]


def one_head(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, more: tuple[Tensor, Tensor, Tensor] | None, iterations: int
) -> Tensor:
    """q, k (F, H, W, D), v (F*H*W, D), real (F, H, W) → (F*H*W, D)."""
    frames, rows, columns, d = q.shape
    has_key = real.any(-1)  # (f, k)
    out = []
    for a in range(frames):
        # whoever looks along key row (f, k) for column j: at first the query at row k of frame a
        looks = (q[a] * real[a][..., None])[None].expand(frames, -1, -1, -1)  # (f, k, j, D)
        for turn in range(iterations):
            inside = torch.einsum("fkjd,fkld->fkjl", looks, k) / d**0.5
            inside = inside.masked_fill(~real[:, :, None, :], float("-inf"))
            R = softmax(inside)
            entropy = -(R * torch.log(R.clamp(min=1e-300))).sum(-1)  # (f, k, j)
            mean_key = torch.einsum("fkjl,fkld->fkjd", R, k)
            outside = torch.einsum("ijd,fkjd->jifk", q[a], mean_key) / d**0.5 + entropy.permute(2, 0, 1)[:, None]
            outside = outside.masked_fill(~has_key, float("-inf")).flatten(2)  # (j, i, f*k)
            if more is not None:
                added = torch.einsum("ijd,md->jim", q[a], more[0]) / d**0.5
                outside = torch.cat([outside, added.masked_fill(~more[2], float("-inf"))], -1)
            L = softmax(outside)
            near = L[..., : frames * rows].unflatten(-1, (frames, rows))  # (j, i, f, k)
            if turn < iterations - 1:
                counted = near * real[a].T[:, :, None, None]
                mass = counted.sum(1)  # (j, f, k)
                looks = torch.einsum("jifk,ijd->fkjd", counted, q[a])
                looks = looks / mass.masked_fill(mass == 0, 1.0).permute(1, 2, 0)[..., None]
        dense = torch.einsum("jifk,fkjl->ijfkl", near, R).reshape(rows * columns, -1)
        y = dense @ v
        if more is not None:
            y = y + L[..., frames * rows :].transpose(0, 1).reshape(rows * columns, -1) @ more[1]
        out.append(y)
    return torch.cat(out)


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; a row without any number is zero."""
    largest = logits.amax(-1, keepdim=True).detach()
    shifted = torch.exp(logits - largest.masked_fill(largest == float("-inf"), 0.0))
    total = shifted.sum(-1, keepdim=True)
    return shifted / total.masked_fill(total == 0, 1.0)
