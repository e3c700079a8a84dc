"""What changes over time: flicker, and how much of a frame the previous one explains by moving.

Flicker. Of three consecutive frames of luma, ``d = x[t+1] - 2 x[t] + x[t-1]``; a pixel that alternates by ±a has ``|d| = 4a``, one
that fades steadily has d = 0. The measure is RMS(d)/4: the amplitude of what alternates. Beside it stands the mean absolute
difference of consecutive frames in RGB, which VBench (arXiv:2311.17982) calls temporal flickering, as 1 minus it over 255.

Consistency. The warping error of Lai et al. (arXiv:1808.00449) without a flow network: blocks of 16 x 16 of the luma, reduced
so that the longer side has at most 512 pixels, are searched for in the previous frame within ±8 reduced pixels; the measure is
the RMS of what the best match leaves. Blocks stand 8 pixels or more from the border, so that every candidate lies in the frame.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError

LUMA = (0.2126, 0.7152, 0.0722)
LONGEST = 512
BLOCK = 16
REACH = 8


def luma(frame: Tensor) -> Tensor:
    """BT.709 luma (H, W) on the scale 0..255 of RGB (3, H, W)."""
    weights = torch.tensor(LUMA, device=frame.device)
    return torch.einsum("c,chw->hw", weights, frame.float())


class Flicker:
    """Amplitude of what alternates from frame to frame, and the mean change. Needs three frames."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []
        self._last: Tensor | None = None
        self._squares: list[float] = []
        self._changes: list[float] = []

    def update(self, frame: Tensor) -> None:
        """Take the next frame, uint8 (3, H, W)."""
        y = luma(frame)
        if len(self._before) == 2:
            second = y - 2 * self._before[1] + self._before[0]
            self._squares.append(float(second.double().square().mean()))
        if self._last is not None:
            self._changes.append(float((frame.short() - self._last.short()).abs().double().mean()))
        self._before = [*self._before[-1:], y]
        self._last = frame

    def result(self) -> dict[str, Any]:
        if not self._squares:
            raise UsageError("flicker needs three frames or more")
        value = math.sqrt(math.fsum(self._squares) / len(self._squares)) / 4
        return {"value": value, "change": math.fsum(self._changes) / len(self._changes)}


class Consistency:
    """RMS of the luma that no moved block of the previous frame explains; ``unmoved`` is the RMS without any motion."""

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._left: list[float] = []
        self._unmoved: list[float] = []
        self._factor = 1

    def update(self, frame: Tensor) -> None:
        """Take the next frame, uint8 (3, H, W)."""
        y = luma(frame)
        self._factor = math.ceil(max(y.shape) / LONGEST)
        if self._factor > 1:
            y = F.avg_pool2d(y[None], self._factor)[0]
        if min(y.shape) < BLOCK + 2 * REACH:
            size = f"{y.shape[1]}x{y.shape[0]}"
            raise UsageError(
                f"consistency searches blocks of {BLOCK} within ±{REACH} pixels and needs {BLOCK + 2 * REACH} per side; "
                f"this frame, reduced {self._factor} times, has {size}"
            )
        if self._before is not None:
            left, unmoved = residuals(y, self._before)
            self._left.append(float(left.double().mean()))
            self._unmoved.append(float(unmoved.double().mean()))
        self._before = y

    def result(self) -> dict[str, Any]:
        if not self._left:
            raise UsageError("consistency needs two frames or more")
        left, unmoved = (math.sqrt(math.fsum(z) / len(z)) for z in (self._left, self._unmoved))
        return {"value": left, "unmoved": unmoved, "reduced": self._factor, "reach_px": REACH * self._factor}


def residuals(frame: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error per block, after the best motion and without motion, each (rows, columns) of blocks.

    `frame` and `before` are luma (H, W), both sides at least 32.
    """
    rows, columns = ((side - 2 * REACH) // BLOCK for side in frame.shape)
    height, width = rows * BLOCK, columns * BLOCK
    here = frame[REACH : REACH + height, REACH : REACH + width]
    best = unmoved = torch.full((rows, columns), torch.inf, device=frame.device)
    for dy in range(2 * REACH + 1):
        for dx in range(2 * REACH + 1):
            there = before[dy : dy + height, dx : dx + width]
            error = F.avg_pool2d((here - there).square()[None], BLOCK)[0]
            best = torch.minimum(best, error)
            if dy == dx == REACH:
                unmoved = error
    return best, unmoved


class FeatureConsistency:
    """Mean cosine of the features of consecutive frames, and of each frame with the first.

    `network` maps (1, 3, H, W) in [-1, 1] to (1, F).
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._next: list[float] = []
        self._from_first: list[float] = []

    def update(self, frame: Tensor) -> None:
        """Take the next frame, uint8 (3, H, W)."""
        features = F.normalize(self._network(frame[None].float() / 127.5 - 1).double()[0], dim=0)
        if self._first is None or self._last is None:
            self._first = features
        else:
            self._next.append(float(features @ self._last))
            self._from_first.append(float(features @ self._first))
        self._last = features

    def result(self) -> dict[str, Any]:
        if not self._next:
            raise UsageError("feature_consistency needs two frames or more")
        value, first = (math.fsum(z) / len(z) for z in (self._next, self._from_first))
        return {"value": value, "with_first": first}
