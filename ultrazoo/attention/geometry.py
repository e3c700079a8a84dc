"""Where the tokens of a branch are: its grids, windows, coordinates and who can influence whom. Integers and numpy.

Every stage (cells, resize, windows, lift) is a product over the axes, so influence is too: three small matrices, at any
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..grid import Grid
from ..ops.partition import Cuts
from ..ops.runs import AxisCut
from .parts.base import CompressSpec, LayoutSpec, ShiftSpec


@dataclass(frozen=True)
class Geometry:
    """A branch at one grid and layer. `coarse_*`: after compression; `*_grid`: after the layout's resize, as attended."""

    grid: Grid
    coarse_q: Grid
    coarse_k: Grid
    q_grid: Grid
    k_grid: Grid
    q_cuts: Cuts
    k_cuts: Cuts

    @property
    def pairs(self) -> int:
        """Query-key pairs in all windows."""
        total = 1
        for q, k in zip(self.q_cuts, self.k_cuts, strict=True):
            total *= sum(a * b for a, b in zip(q.sizes(), k.sizes(), strict=True))
        return total

    @property
    def matched(self) -> bool:
        """Do queries and keys have the same number of windows on every axis?"""
        return all(q.windows == k.windows for q, k in zip(self.q_cuts, self.k_cuts, strict=True))


def geometry(compress: CompressSpec | None, layout: LayoutSpec, shift: ShiftSpec, grid: Grid, layer: int) -> Geometry:
    """Grids and windows of a branch; raises ValueError or ZeroDivisionError only where `problems` has found some."""
    coarse_k = grid if compress is None else compress.coarse(grid)
    coarse_q = coarse_k if compress is not None and compress.of == "both" else grid
    q_grid, k_grid = (layout.resized(coarse, layer, shift) for coarse in (coarse_q, coarse_k))
    q_cuts = layout.cuts(q_grid, layer, shift)
    k_cuts = q_cuts if k_grid == q_grid else layout.cuts(k_grid, layer, shift)
    return Geometry(grid, coarse_q, coarse_k, q_grid, k_grid, q_cuts, k_cuts)


def axis_positions(cut: AxisCut, factor: int, origin: str, cell: str) -> list[float]:
    """Coordinates of one axis of `cut.length` tokens, each a cell of `factor` tokens of the grid.

    ``cell: index`` puts cell i at i, ``centre`` at the mean place of its tokens; ``origin: window`` counts from the first
    token of the window.
    """
    scale, offset = (factor, (factor - 1) / 2) if cell == "centre" else (1, 0.0)
    places = [i * scale + offset for i in range(cut.length)]
    if origin == "grid":
        return places
    return [place - places[first] for place, first in zip(places, cut.first(), strict=True)]


# --- influence ------------------------------------------------------------------------------------------------------


def _cells(length: int, factor: int, count: int, used: int) -> np.ndarray:
    """(count, length): which tokens make up a cell; its first `used` matter."""
    matrix = np.zeros((count, length), dtype=bool)
    for i in range(count):
        matrix[i, i * factor : i * factor + used] = True
    return matrix


def _resize(source: int, target: int, mode: str = "bilinear") -> np.ndarray:
    """(target, source): which source tokens interpolation reads, ``align_corners=False``, no antialiasing."""
    matrix = np.zeros((target, source), dtype=bool)
    if source == target:
        np.fill_diagonal(matrix, True)
        return matrix
    at = np.arange(target)
    if mode == "nearest":
        matrix[at, np.minimum(at * source // target, source - 1)] = True
        return matrix
    place = np.clip((at + 0.5) * source / target - 0.5, 0, None)
    low = np.minimum(np.floor(place).astype(int), source - 1)
    part = place - np.floor(place)
    matrix[at, low] = True
    mixed = part > 0
    matrix[at[mixed], np.minimum(low[mixed] + 1, source - 1)] = True
    return matrix


def _same_window(q: AxisCut, k: AxisCut) -> np.ndarray:
    return np.asarray(q.window_of())[:, None] == np.asarray(k.window_of())[None, :]


def _product(*matrices: np.ndarray) -> np.ndarray:
    total = matrices[0].astype(np.float32)
    for matrix in matrices[1:]:
        total = (total @ matrix.astype(np.float32) > 0).astype(np.float32)
    return total > 0


def axis_influence(place: Geometry, axis: int, compress: CompressSpec | None) -> np.ndarray:
    """(L, L) bool of one axis: may the output at a row depend on the input at a column? The three axes multiply."""
    length = place.grid[axis]
    factor = 1 if compress is None else compress.cell[axis]
    used = 1 if compress is not None and compress.reads == "first" else factor
    cells = _cells(length, factor, place.coarse_k[axis], used)
    keys = _product(_resize(place.coarse_k[axis], place.k_grid[axis]), cells)
    seen = _product(_same_window(place.q_cuts[axis], place.k_cuts[axis]), keys)
    if compress is not None and compress.of == "keys":
        return seen
    back = _back(place, axis, compress, length, factor)
    if compress is not None and compress.lift_mode == "bilinear_conv3d":
        near = np.abs(np.arange(length)[:, None] - np.arange(length)[None, :]) <= 1
        back = _product(near, back)
    return _product(back, seen)


def _back(place: Geometry, axis: int, compress: CompressSpec | None, length: int, factor: int) -> np.ndarray:
    """(L, attended length): which attended tokens the output at a row is interpolated from."""
    attended, coarse = place.q_grid[axis], place.coarse_q[axis]
    if compress is None:
        return _resize(attended, length)
    mode = "nearest" if compress.lift_mode == "nearest" else "bilinear"
    if compress.ragged == "resize":
        return _resize(attended, length, mode)
    lifted = _resize(coarse, coarse * factor, mode)[:length]
    return _product(lifted, _resize(attended, coarse))


def influence(place: Geometry, compress: CompressSpec | None, queries: Sequence[int] | None) -> np.ndarray:
    """(queries, N) bool; None means every query. A token always influences itself (as its own query)."""
    t, h, w = (axis_influence(place, axis, compress) for axis in range(3))
    grid = place.grid
    wanted = np.arange(grid.tokens) if queries is None else np.asarray(queries, dtype=int)
    frame, rest = np.divmod(wanted, grid.h * grid.w)
    row, column = np.divmod(rest, grid.w)
    box = t[frame][:, :, None, None] & h[row][:, None, :, None] & w[column][:, None, None, :]
    seen = box.reshape(len(wanted), grid.tokens)
    seen[np.arange(len(wanted)), wanted] = True
    return seen


def spread(place: Geometry, compress: CompressSpec | None, tokens: np.ndarray) -> np.ndarray:
    """Sets of tokens (sets, N) → what any token of a set may depend on: the union of `influence` over it, axis by axis."""
    axes = [axis_influence(place, axis, compress) for axis in range(3)]
    seen = np.array(tokens, dtype=bool)
    for row in seen.reshape(-1, *place.grid):
        # only the rows and columns of each axis that the set and its keys have
        used = [np.flatnonzero(row.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        keys = [np.flatnonzero(matrix[lines].any(axis=0)) for matrix, lines in zip(axes, used, strict=True)]
        t, h, w = (axes[i][np.ix_(used[i], keys[i])].astype(np.float32) for i in range(3))
        ways = h.T @ (row[np.ix_(*used)].astype(np.float32) @ w)
        row[np.ix_(*keys)] |= np.tensordot(t.T, ways, axes=1) > 0
    return seen
