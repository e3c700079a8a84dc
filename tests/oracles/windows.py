"""Which tokens of an axis share a group: layouts and shifts, by counting.

A layout gives every index of an axis a label; two tokens see each other when their labels agree on all three axes.
Source: design 7 (balanced windows, longer first; exact windows and a short last one; residue classes), Swin
arXiv:2103.14030 for the roll, UltraGen arXiv:2510.18775 for K and K+1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def three(value: int | Sequence[int], whole: int) -> tuple[int, int, int]:
    """One number or two mean (H, W) with T = `whole`; three mean (T, H, W)."""
    if isinstance(value, int):
        return (whole, value, value)
    return (whole, *value) if len(value) == 2 else tuple(value)  # type: ignore[return-value]


def counts_at(layout: Mapping[str, Any], shift: Mapping[str, Any], layer: int) -> tuple[int, int, int] | None:
    """Windows (or residue classes) per axis at this layer, or None when windows are given by size."""
    if layout.get("counts") is None:
        return None
    counts = three(layout["counts"], whole=1)
    if shift["name"] == "repartition" and layer % 2 == 1:
        frames, rows, columns = counts
        counts = (frames if frames == 1 else frames + 1, rows + 1, columns + 1)
    return counts


def balanced(size: int, count: int) -> list[int]:
    """Lengths of `count` windows on an axis: as even as possible, longer ones first."""
    return [size // count + (1 if i < size % count else 0) for i in range(count)]


def labels_of_runs(lengths: Sequence[int]) -> list[int]:
    """[2, 3] → [0, 0, 1, 1, 1]; empty runs take no label."""
    out: list[int] = []
    for label, length in enumerate(n for n in lengths if n > 0):
        out += [label] * length
    return out


def window_lengths(size: int, axis: int, layout: Mapping[str, Any], shift: Mapping[str, Any], layer: int) -> list[int]:
    """Lengths of the contiguous windows on one axis, shift included."""
    rolled = shift["name"] == "roll" and layer % 2 == 1
    counts = counts_at(layout, shift, layer)
    if counts is not None:
        lengths = balanced(size, counts[axis])
        if not rolled or len(lengths) == 1:
            return lengths
        borders, start = [], 0
        for length in lengths:
            borders.append(start + length // 2)
            start += length
        edges = [0, *borders, size]
        return [b - a for a, b in itertools.pairwise(edges) if b > a]
    window = three(layout["size"], whole=size)[axis]
    if size <= window:
        return [size]
    first = window // 2 if rolled else window
    edges = [0]
    position = first
    while position < size:
        edges.append(position)
        position += window
    edges.append(size)
    return [b - a for a, b in itertools.pairwise(edges) if b > a]


def axis_labels(size: int, axis: int, layout: Mapping[str, Any], shift: Mapping[str, Any], layer: int) -> list[int]:
    """The group of every index on one axis (0 = t, 1 = h, 2 = w)."""
    if layout["name"] == "whole":
        return [0] * size
    if layout["name"] == "strided":
        counts = counts_at(layout, shift, layer)
        assert counts is not None
        return [i % counts[axis] for i in range(size)]
    return labels_of_runs(window_lengths(size, axis, layout, shift, layer))


def nearest_multiple(size: int, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, ties down, at least one unit."""
    below = size // unit * unit
    return max(unit, below + unit if (size - below) * 2 > unit else below)


def resized(grid: Sequence[int], layout: Mapping[str, Any], shift: Mapping[str, Any], layer: int) -> tuple[int, ...]:
    """The grid on which a layout with ``ragged: resize`` works."""
    if layout.get("ragged", "exact") != "resize":
        return tuple(grid)
    counts = counts_at(layout, shift, layer)
    out = []
    for axis, size in enumerate(grid):
        unit = counts[axis] if counts is not None else min(size, three(layout["size"], whole=size)[axis])
        out.append(nearest_multiple(size, unit))
    return tuple(out)


def same_group(query_labels: Sequence[Sequence[int]], key_labels: Sequence[Sequence[int]]) -> Tensor:
    """Bool (query tokens, key tokens), t-major, from one list of labels per axis each."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for q, k in zip(query_labels, key_labels, strict=True):
        axis = torch.tensor([[a == b for b in k] for a in q])
        rows, columns = mask.shape
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).reshape(rows * len(q), columns * len(k))
    return mask


def token_positions(labels: Sequence[Sequence[int]], factor: Sequence[int], origin: str, cell: str) -> Tensor:
    """Coordinates (n, 3) of every token of a (compressed) map.

    ``cell: index`` puts token i at i, ``centre`` at ``i*factor + (factor - 1)/2``. ``origin: window`` subtracts the
    position of the first token of the same group, on every axis that is split.
    """
    per_axis = []
    for axis, axis_label in enumerate(labels):
        f = factor[axis]
        place = [float(i) if cell == "index" else i * f + (f - 1) / 2 for i in range(len(axis_label))]
        if origin == "window":
            place = [p - place[list(axis_label).index(label)] for p, label in zip(place, axis_label, strict=True)]
        per_axis.append(place)
    rows = [(a, b, c) for a in per_axis[0] for b in per_axis[1] for c in per_axis[2]]
    return torch.tensor(rows, dtype=torch.float64)
