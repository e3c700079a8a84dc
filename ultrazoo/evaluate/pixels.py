"""PSNR and SSIM of a video against its reference, one frame at a time.

PSNR is that of the error of all frames together, not the mean of the frames' decibels, so that one broken frame is not hidden by
perfect ones. SSIM (Wang et al., 2004; doi:10.1109/TIP.2003.819861) is torchmetrics', over strips of rows: borders are
reflected, the window is Gaussian with sigma 1.5 and 11 x 11 taps.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

PEAK = 255.0
STRIP = 256
HALO = 5
"""Rows on each side of a row on which its SSIM depends."""


class Psnr:
    """Peak signal-to-noise ratio in dB; None where the videos are identical. Knows the worst frame."""

    def __init__(self) -> None:
        self._squares: list[float] = []

    def update(self, frame: Tensor, reference: Tensor) -> None:
        """Take one pair of frames, uint8 (3, H, W)."""
        # integers: the sum of squares is exact
        difference = frame.int() - reference.int()
        self._squares.append(int(difference.square().sum()) / frame.numel())

    def result(self) -> dict[str, Any]:
        worst = max(range(len(self._squares)), key=self._squares.__getitem__)
        value = decibels(math.fsum(self._squares) / len(self._squares))
        if value is None:
            return {"value": None, "note": "identical: there is no error"}
        return {"value": value, "worst": decibels(self._squares[worst]), "worst_frame": worst}


def decibels(mse: float) -> float | None:
    """PSNR of a mean squared error on the scale 0..255; None for no error, which has no finite value."""
    return 10 * math.log10(PEAK**2 / mse) if mse > 0 else None


class Ssim:
    """Structural similarity, mean over channels, pixels and frames. Frames must have 11 pixels or more per side."""

    def __init__(self) -> None:
        self._frames: list[float] = []

    def update(self, frame: Tensor, reference: Tensor) -> None:
        """Take one pair of frames, uint8 (3, H, W)."""
        height = frame.shape[-2]
        total = 0.0
        for top in range(0, height, STRIP):
            bottom = min(top + STRIP, height)
            # a strip shorter than the window cannot be reflected: it takes more rows of its neighbour
            start, stop = max(0, min(top, height - 2 * HALO) - HALO), min(height, bottom + HALO)
            total += float(
                _similarity(frame[:, start:stop], reference[:, start:stop])[top - start : bottom - start].sum()
            )
        self._frames.append(total / height)

    def result(self) -> dict[str, Any]:
        worst = min(range(len(self._frames)), key=self._frames.__getitem__)
        value = math.fsum(self._frames) / len(self._frames)
        return {"value": value, "worst": self._frames[worst], "worst_frame": worst}


def _similarity(frame: Tensor, reference: Tensor) -> Tensor:
    """SSIM of each row (H,) of uint8 (3, H, W), mean over channels and columns."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (z.unsqueeze(0).float() / PEAK for z in (frame, reference))
    _, full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    return full.double().mean(dim=(0, 1, 3))
