"""UltraGen's HD-FVD (arXiv:2510.18775): the Fréchet video distance (arXiv:1812.01717) of patches at native resolution.

Frames are cut into squares of the network's input size, evenly spaced so that every pixel is in one, and runs of frames that do not
overlap; each such clip gives one vector of features. With means m and covariances S of the two sets,
``|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)``. The paper says neither how patches are spaced nor how many frames a clip has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

BATCH = 4


class Moments:
    """Mean and covariance of vectors that arrive in batches; in fp64, about the first vector against cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._outer = torch.zeros(0)

    def update(self, features: Tensor) -> None:
        """Take vectors (B, F)."""
        z = features.double().cpu()
        if not self.count:
            self._origin = z[0].clone()
            self._sum = torch.zeros_like(self._origin)
            self._outer = torch.zeros(len(self._origin), len(self._origin), dtype=torch.float64)
        z = z - self._origin
        self.count += len(z)
        self._sum += z.sum(0)
        self._outer += z.T @ z

    @property
    def features(self) -> int:
        return len(self._sum)

    def mean(self) -> Tensor:
        return self._origin + self._sum / self.count

    def covariance(self) -> Tensor:
        """Unbiased, (F, F). Needs two vectors."""
        centre = self._sum / self.count
        return (self._outer - self.count * torch.outer(centre, centre)) / (self.count - 1)


def frechet(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of the normal distributions with these moments; never negative."""
    s, t = a.covariance(), b.covariance()
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (S T)^½ through the symmetric S^½ T S^½, which has the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean() - b.mean()).square().sum() + s.trace() + t.trace() - 2 * cross
    return max(float(distance), 0.0)


def starts(length: int, patch: int) -> list[int]:
    """First pixels of the fewest patches that cover `length`, evenly spaced."""
    count = -(-length // patch)
    if count == 1:
        return [0]
    return [round(i * (length - patch) / (count - 1)) for i in range(count)]


class Patches:
    """Features of the clips of videos that are streamed one after the other; see the module's docstring.

    `network` maps (B, 3, T, S, S) in [-1, 1] to (B, F). Holds one clip of whole frames, as bytes.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], *, patch_px: int, clip_frames: int):
        self.moments = Moments()
        self.unused = 0
        self._network = network
        self._patch = patch_px
        self._length = clip_frames
        self._clip: list[Tensor] = []

    def update(self, frame: Tensor) -> None:
        """Take the next frame, uint8 (3, H, W)."""
        self._clip.append(frame)
        if len(self._clip) == self._length:
            for clips in self._batches():
                self.moments.update(self._network(clips))
            self._clip = []

    def end(self) -> None:
        """A video is over: frames that fill no clip are counted as unused."""
        self.unused += len(self._clip)
        self._clip = []

    def _batches(self) -> Iterator[Tensor]:
        height, width = self._clip[0].shape[-2:]
        corners = [(y, x) for y in starts(height, self._patch) for x in starts(width, self._patch)]
        for begin in range(0, len(corners), BATCH):
            cut = [
                torch.stack([frame[:, y : y + self._patch, x : x + self._patch] for frame in self._clip], 1)
                for y, x in corners[begin : begin + BATCH]
            ]
            yield torch.stack(cut).float() / 127.5 - 1


def compare(videos: Patches, references: Patches) -> dict[str, Any]:
    """The distance of two sets of videos, with the number of clips behind it. Raises UsageError for fewer than two clips."""
    counts = (videos.moments.count, references.moments.count)
    if min(counts) < 2:
        raise UsageError(
            f"hd_fvd needs two clips or more on each side, got {counts[0]} and {counts[1]}; give longer videos"
        )
    found: dict[str, Any] = {
        "value": frechet(videos.moments, references.moments),
        "clips": list(counts),
        "features": videos.moments.features,
        "unused_frames": [videos.unused, references.unused],
    }
    if min(counts) <= videos.moments.features:
        found["note"] = (
            f"{min(counts)} clips are few for {videos.moments.features} features: the distance is biased upwards, "
            "compare only sets of the same size"
        )
    return found
