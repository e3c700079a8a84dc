"""UltraGen's HD-MSE and HD-LPIPS (arXiv:2510.18775): how much a frame loses when it is made smaller and larger again.

For each factor of 8, 16 and 32 a frame is reduced to (H // factor, W // factor) and enlarged to (H, W); the measure is the mean
over factors and frames of the distance between the frame and that. Higher means more fine detail, or more noise. The paper
names no filters: here the reduction averages areas, so that nothing aliases, and the enlargement is bilinear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

FACTORS = (8, 16, 32)
Distance = Callable[[Tensor, Tensor], Tensor]


def coarse(frames: Tensor, factor: int) -> Tensor:
    """Frames (B, 3, H, W) without what is finer than `factor` pixels; both sides have at least `factor` pixels."""
    height, width = frames.shape[-2:]
    small = F.adaptive_avg_pool2d(frames, (height // factor, width // factor))
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


class Detail:
    """Mean distance between frames and their coarse selves, over factors and frames.

    `distance` takes two batches (1, 3, H, W) of levels 0..255 and gives one number per frame.
    """

    def __init__(self, distance: Distance) -> None:
        self._distance = distance
        self._found: dict[int, list[float]] = {factor: [] for factor in FACTORS}

    def update(self, frame: Tensor) -> None:
        """Take one frame, uint8 (3, H, W)."""
        levels = frame[None].float()
        for factor, found in self._found.items():
            found.append(float(self._distance(levels, coarse(levels, factor))))

    def result(self) -> dict[str, Any]:
        means = {str(factor): math.fsum(found) / len(found) for factor, found in self._found.items()}
        return {"value": math.fsum(means.values()) / len(means), "factors": means}


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).double().square().mean()
