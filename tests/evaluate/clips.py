"""Videos that the tests render and encode themselves, without loss unless said otherwise, and small feature networks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Frames = NDArray[np.uint8]
"""(T, H, W, 3)."""


def noise(frames: int, height: int, width: int, *, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def smooth(frames: int, height: int, width: int, *, seed: int = 0, grain: int = 9) -> Frames:
    """Moving blobs: noise in time and space, averaged over `grain` pixels by a box in fp64, stretched to 0..255."""
    rng = np.random.default_rng(seed)
    field = rng.standard_normal((frames + 3, height + grain, width + grain, 3))
    for axis, length in ((0, 3), (1, grain), (2, grain)):
        sums = np.cumsum(field, axis)
        ahead = np.take(sums, range(length, sums.shape[axis]), axis)
        field = ahead - np.take(sums, range(sums.shape[axis] - length), axis)
    low, high = field.min(), field.max()
    return np.round((field - low) / (high - low) * 255).astype(np.uint8)


def panning(frames: int, height: int, width: int, step: tuple[int, int], *, seed: int = 0) -> Frames:
    """A still picture of noise behind a window that moves by `step` (rows, columns) each frame."""
    dy, dx = step
    room = (frames - 1) * max(abs(dy), abs(dx))
    still = noise(1, height + 2 * room, width + 2 * room, seed=seed)[0]
    cut = [still[room + t * dy : room + t * dy + height, room + t * dx : room + t * dx + width] for t in range(frames)]
    return np.stack(cut)


def write(
    path: Path,
    frames: Frames | Sequence[Frames],
    *,
    codec: str = "ffv1",
    form: str = "bgr0",
    rate: int = 8,
    **options: str,
) -> Path:
    """Encode RGB frames into `path`; ffv1 in Matroska keeps every value. `options` are the container's."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = form
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def sound(path: Path, *, rate: int = 8000) -> Path:
    """A file with audio alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate)
        samples = np.zeros((1, rate), dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


def alexnet(widths: Sequence[int] = (4, 5, 6, 5, 4), *, seed: int = 0) -> dict[str, Tensor]:
    """A state dict like torchvision's AlexNet with the weights of LPIPS's stages, at small widths."""
    return _stack((0, 3, 6, 8, 10), (11, 5, 3, 3, 3), widths, seed) | _stages(widths, seed)


def vgg(widths: Sequence[int] = (3, 4, 5, 4, 3), *, seed: int = 0) -> dict[str, Tensor]:
    """A state dict like torchvision's VGG16 with the weights of LPIPS's stages, at small widths."""
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    numbers = [number for stage in stages for number in stage]
    each = [width for width, stage in zip(widths, stages, strict=True) for _ in stage]
    return _stack(numbers, [3] * 13, each, seed) | _stages(widths, seed)


def _stack(numbers: Sequence[int], kernels: Sequence[int], widths: Sequence[int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors, channels = {}, 3
    for number, kernel, width in zip(numbers, kernels, widths, strict=True):
        scale = 2 / (channels * kernel**2) ** 0.5
        tensors[f"features.{number}.weight"] = scale * torch.randn(width, channels, kernel, kernel, generator=generator)
        tensors[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels = width
    return tensors


def _stages(widths: Sequence[int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate(widths)}


class Clips(nn.Module):
    """A network of clips: the means of each channel and of products of neighbours along each axis. (B, 3, T, S, S) → (B, 6)."""

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3, 4))
        t = (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2, 3, 4))
        h = (x[..., 1:, :] * x[..., :-1, :]).mean((1, 2, 3, 4))
        w = (x[..., 1:] * x[..., :-1]).mean((1, 2, 3, 4))
        return torch.cat([means, torch.stack([t, h, w], 1)], 1)


class I3DLike(Clips):
    """The arguments of the I3D file that most FVD programs use; anything but raw features spoils the result."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale or resize or not return_features:
            return x.mean((2, 3, 4)) * float("nan")
        return x.flatten(2).std(2)


class Frame(nn.Module):
    """A network of frames: a coarse picture. (B, 3, H, W) → (B, 48)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, (4, 4)).flatten(1)


class Euclid(nn.Module):
    """A distance of frames: RMS over everything."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3), keepdim=True).sqrt()


class Broken(nn.Module):
    """Gives what no role wants."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def script(module: nn.Module, path: Path) -> Path:
    """Write a module as TorchScript."""
    with warnings.catch_warnings():
        # deprecated by torch; the published I3D is such a file all the same
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path
