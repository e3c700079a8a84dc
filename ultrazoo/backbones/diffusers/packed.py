"""Packed sequences: a grid's rows among other rows of one axis, and the grid itself where only coordinates tell it.

Models that take rows (B, S, C) instead of latents (LTX, LTX-2, MiniMax-H3) hand their attention one sequence. The target
video is one run of it; conditions, references, text and audio lie before and after.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UsageError
from ...grid import Grid
from .host import ModuleHost
from .processor import Processor, Stream

Turn = Callable[[Tensor], Tensor]


class Run(NamedTuple):
    """Rows ``start:stop`` of the packed sequence, beside the grid, of one kind; on a `grid` of their own or none."""

    kind: str
    start: int
    stop: int
    grid: Grid | None = None


@dataclass(frozen=True)
class Beside:
    """What a forward knows of its packed sequence. `runs` cover every row outside the grid, in order.

    `key_mask` (B, S): which rows are real. `refused`: why the attentions cannot run at all.
    """

    runs: tuple[Run, ...] = ()
    key_mask: Tensor | None = None
    refused: str | None = None


def around(start: int, stop: int, length: int, kind: str) -> tuple[Run, ...]:
    """The rows before and after ``start:stop`` of a sequence of `length` rows, all of one kind."""
    return tuple(Run(kind, a, b) for a, b in ((0, start), (stop, length)) if a < b)


class PackedProcessor(Processor):
    """(B, S, C) → (B, S, C), the grid's rows by our attention, the others beside it."""

    def packed(self, x: Tensor, host: ModuleHost, turn: Callable[[Run], Turn | None]) -> Tensor:
        """Attention over rows x (B, S, C). ``turn(run)`` rotates q and k (B, n, heads, D) of a run by the model's own table.

        Raises UsageError where the sequence was found to be one that our attentions cannot serve.
        """
        frame = self.frame
        beside: Beside = frame.own
        if beside.refused is not None:
            raise UsageError(f"{self.installed.adapter.model}: {beside.refused}")
        start, stop = frame.start, frame.start + frame.tokens
        mask = beside.key_mask
        streams = [
            Stream(
                run.kind,
                *host.rows(x[:, run.start : run.stop], turn(run)),
                None if mask is None else mask[:, run.start : run.stop],
                grid=run.grid,
            )
            for run in beside.runs
        ]
        valid = None if mask is None else mask[:, start:stop]
        y, others = self.attend(x[:, start:stop], self.at(host, start, stop), streams, key_valid=valid)
        if not streams:
            return y
        rows = [self.at(host, run.start, run.stop).out(raw) for run, raw in zip(beside.runs, others, strict=True)]
        before = sum(run.stop <= start for run in beside.runs)
        return torch.cat([*rows[:before], y, *rows[before:]], dim=1)

    def at(self, host: ModuleHost, start: int, stop: int) -> ModuleHost:
        """`host` for rows ``start:stop``, where its output depends on the row."""
        return host


class Raster(NamedTuple):
    """Rows ``start``, … that fill `grid` t-major, and the coordinates of each axis, fp64 on the CPU."""

    start: int
    grid: tuple[int, int, int]
    axes: tuple[Tensor, Tensor, Tensor]

    @property
    def stop(self) -> int:
        t, h, w = self.grid
        return self.start + t * h * w


class _Picture(NamedTuple):
    """Rows of one time that fill rows and columns, and how long they last, where that is known."""

    start: int
    t: float
    h: Tensor
    w: Tensor
    lasts: float = 0.0


def rasters(coordinates: Tensor, lasting: Tensor | None = None) -> list[Raster]:
    """Every longest run of frames of one shape at rising times, among rows at (t, h, w): (n, 3) → in order.

    A frame ends where the time changes or rows start over. `lasting` (n,): how long each row's frame lasts; all frames of
    a run last as long as one another, but for the first. Rows that are no frame are in no run.
    """
    at = coordinates.detach().to("cpu", torch.float64)
    step = at[1:] - at[:-1]
    over = (step[:, 0] != 0) | (step[:, 1] < 0) | ((step[:, 1] == 0) & (step[:, 2] <= 0))
    edges = [0, *(torch.nonzero(over)[:, 0] + 1).tolist(), at.shape[0]]
    found: list[list[_Picture]] = []
    last: _Picture | None = None
    for first, end in itertools.pairwise(edges):
        picture = _picture(at, first, end)
        if picture is not None and lasting is not None:
            picture = picture._replace(lasts=float(lasting[first]))
        if picture is not None and last is not None and _follows(picture, last, found[-1]):
            found[-1].append(picture)
        elif picture is not None:
            found.append([picture])
        last = picture
    return [
        Raster(
            run[0].start,
            (len(run), len(run[0].h), len(run[0].w)),
            (torch.tensor([one.t for one in run], dtype=torch.float64), run[0].h, run[0].w),
        )
        for run in found
    ]


def _picture(at: Tensor, first: int, end: int) -> _Picture | None:
    rows = at[first:end]
    width = int((rows[:, 1] == rows[0, 1]).sum())
    if len(rows) % width:
        return None
    h, w = rows[:, 1].unflatten(0, (-1, width)), rows[:, 2].unflatten(0, (-1, width))
    if not (torch.equal(h, h[:, :1].expand_as(h)) and torch.equal(w, w[:1].expand_as(w))):
        return None
    return _Picture(first, float(rows[0, 0]), h[:, 0], w[0])


def _follows(one: _Picture, before: _Picture, run: list[_Picture]) -> bool:
    # a causal VAE's first frame stands for one picture, the others for several; seconds are rounded
    alike = len(run) == 1 or math.isclose(one.lasts, before.lasts, rel_tol=1e-2)
    return alike and one.t > before.t and torch.equal(one.h, before.h) and torch.equal(one.w, before.w)


def shared(coordinates: Tensor, model: str) -> Tensor:
    """(B, n, 3) → (n, 3). Raises UsageError where the samples of a batch lie at different places."""
    if not torch.equal(coordinates, coordinates[:1].expand_as(coordinates)):
        raise UsageError(f"{model}: the samples of this batch have different coordinates; give one layout a call")
    return coordinates[0]


def chosen(runs: Sequence[Raster], rows: int, model: str) -> Raster:
    """The target among runs of frames in `rows`: the one with the most tokens, the last of equals.

    Raises UsageError where it holds less than half of the rows: their order is then not that of a grid.
    """
    found = max(reversed(runs), key=lambda run: run.stop - run.start, default=None)
    held = 0 if found is None else found.stop - found.start
    if found is None or 2 * held < rows:
        raise UsageError(
            f"{model}: of {rows} rows at most {held} lie on a (T, H, W) grid; rows must come in order of time, height and "
            "width, and the target must be half of them or more"
        )
    return found


def steps_of(timestep: Tensor, batch: int, start: int, stop: int, length: int) -> Tensor:
    """Timesteps given per sample or for each of `length` rows, in any shape, as (B,) or (B, stop - start)."""
    rows = timestep.reshape(batch, -1)
    if rows.shape[1] == 1:
        return rows[:, 0]
    if rows.shape[1] != length:
        raise UsageError(f"timestep holds {rows.shape[1]} values a sample: give 1 or one for each of {length} rows")
    return rows[:, start:stop]
