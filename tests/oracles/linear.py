"""Linear attention as a dense (N, N) matrix of weights that need not be positive: arXiv 2410.10629 and 2509.24695.

``y_i = sum_j <R phi(q_i), R phi(k_j)> v_j / (sum_j <phi(q_i), phi(k_j)> + eps)``: the rotary embedding R is in the numerator
only. Query i sees key j when j's chunk of frames is not after i's; extra keys are seen by all and have no place.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, affine, attend, extra_rows, grid_of, plain, real_keys, scores


def feature(phi: str, z: Tensor) -> Tensor:
    """phi of (…, D), channel by channel or, for the softmax, over the channels of a head."""
    if phi == "relu":
        return torch.where(z > 0, z, torch.zeros_like(z))
    if phi == "elu":
        # elu(z) + 1; the exponential is taken where it is small only
        return torch.where(z > 0, z + 1, torch.exp(torch.where(z > 0, torch.zeros_like(z), z)))
    assert phi == "softmax"
    grown = torch.exp(z - z.amax(-1, keepdim=True))
    return grown / grown.sum(-1, keepdim=True)


def seen(case: Case, chunk: int | None) -> Tensor:
    """Bool (N, N + M): may query i use key j?"""
    t, h, w = case.grid
    frames = [n // (h * w) for n in range(t * h * w)]
    rows = [
        [chunk is None or frames[j] // chunk <= frames[i] // chunk for j in range(t * h * w)] for i in range(t * h * w)
    ]
    extra = 0 if case.extra is None else case.extra.k.shape[1]
    return torch.tensor([row + [True] * extra for row in rows])


def window_at(place: int, length: int, count: int) -> int:
    """Which of `count` windows of an axis, as equal as can be and the longer ones first, holds a place."""
    end, longer = 0, length % count
    for number in range(count):
        end += length // count + (number < longer)
        if place < end:
            return number
    raise AssertionError("a place beyond the axis")


def beside(case: Case, options: Mapping[str, Any]) -> Tensor:
    """SANA-Video's softmax branch: own projections, norms over all heads, rotary embedding, windows, and its factor."""
    own, site = case.own("beside."), case.site
    t, h, w = case.grid
    counts = options["windows"] or (1, 1, 1)

    def projected(name: str) -> Tensor:
        z = affine(own, name, case.x)
        if name != "v" and site.qk_norm:
            z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * own[f"norm_{name}"]
        z = z.unflatten(-1, (site.heads, site.head_dim))
        return z if name == "v" else case.host.rotate(z, grid_of(case.grid))

    window = [
        tuple(window_at(at, n, c) for at, n, c in zip(place, case.grid, counts, strict=True))
        for place in itertools.product(range(t), range(h), range(w))
    ]
    same = torch.tensor([[one == other for other in window] for one in window])
    real = torch.ones(case.x.shape[:2], dtype=torch.bool) if case.key_valid is None else case.key_valid
    found = attend(scores(projected("q"), projected("k"), same & real[:, None, None, :]), projected("v"))
    return own["scale"] * affine(own, "proj", found)


def linear(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    options = plain(case.spec)
    host, place = case.host, grid_of(case.grid)
    q, k = (feature(options["phi"], host.split(host.raw(case.x, which), which)) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    turned_q, turned_k = (host.rotate(z, place) if options["rope"] == "numerator" else z for z in (q, k))
    if case.extra is not None:
        more = feature(options["phi"], case.extra.k)
        k, turned_k = torch.cat([k, more], dim=1), torch.cat([turned_k, more], dim=1)
        v = torch.cat([v, case.extra.v], dim=1)
    allowed = seen(case, options["causal_chunks"]) & real_keys(case)[:, 0]
    columns = []
    for head in range(q.shape[2]):
        signed = turned_q[:, :, head] @ turned_k[:, :, head].transpose(1, 2) * allowed
        positive = q[:, :, head] @ k[:, :, head].transpose(1, 2) * allowed
        columns.append(signed @ v[:, :, head] / (positive.sum(-1, keepdim=True) + options["eps"]))
    y = host.out(torch.cat(columns, dim=-1))
    if options["softmax_branch"] is not None:
        y = y + beside(case, options["softmax_branch"])
    return y if case.extra is None else (y, extra_rows(case))
