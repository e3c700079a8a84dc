"""What the measures of videos are, in fp64 numpy, written from their formulas; frames are (T, H, W, 3) of 0..255."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def psnr(video: Array, reference: Array) -> float:
    """10 log10(255² / mean squared error), the mean over every value of every frame."""
    return float(10 * np.log10(255.0**2 / np.mean((video - reference) ** 2)))


def ssim(video: Array, reference: Array) -> float:
    """Wang et al. 2004: 11 taps of a Gaussian with sigma 1.5, C1 = (0.01 L)², C2 = (0.03 L)², mirrored borders."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(z: Array) -> Array:
        for axis in (0, 1):
            wide = np.pad(z, [(5, 5) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
            z = sum(taps[i] * np.take(wide, range(i, i + z.shape[axis]), axis) for i in range(11))
        return z

    values = []
    for x, y in zip(video, reference, strict=True):
        for channel in range(3):
            a, b = x[..., channel], y[..., channel]
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
            values.append(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))
    return float(np.mean(values))


def luma(video: Array) -> Array:
    """BT.709: (T, H, W, 3) → (T, H, W)."""
    return 0.2126 * video[..., 0] + 0.7152 * video[..., 1] + 0.0722 * video[..., 2]


def flicker(video: Array) -> tuple[float, float]:
    """RMS of the second difference of luma over time, over 4; mean absolute first difference."""
    y = luma(video)
    second = [y[t + 1] - 2 * y[t] + y[t - 1] for t in range(1, len(y) - 1)]
    first = [np.abs(video[t] - video[t - 1]) for t in range(1, len(video))]
    return float(np.sqrt(np.mean(np.square(second))) / 4), float(np.mean(first))


def consistency(video: Array, *, block: int = 16, reach: int = 8, longest: int = 512) -> tuple[float, float]:
    """RMS over blocks of the least squared error against every shift of the frame before, and against none."""
    y = luma(video)
    factor = -(-max(y.shape[1:]) // longest)
    height, width = y.shape[1] // factor, y.shape[2] // factor
    small = np.zeros((len(y), height, width))
    for i in range(factor):
        for j in range(factor):
            small += y[:, i : height * factor : factor, j : width * factor : factor] / factor**2
    best, still = [], []
    for t in range(1, len(small)):
        for top in range(reach, height - reach - block + 1, block):
            for left in range(reach, width - reach - block + 1, block):
                here = small[t, top : top + block, left : left + block]
                errors = {}
                for dy in range(-reach, reach + 1):
                    for dx in range(-reach, reach + 1):
                        there = small[t - 1, top + dy : top + dy + block, left + dx : left + dx + block]
                        errors[dy, dx] = np.mean((here - there) ** 2)
                best.append(min(errors.values()))
                still.append(errors[0, 0])
    return float(np.sqrt(np.mean(best))), float(np.sqrt(np.mean(still)))


def coarse(frame: Array, factor: int) -> Array:
    """(H, W, C) averaged over areas to (H // factor, W // factor), then enlarged to (H, W) by straight lines.

    Area i of n over a length L goes from floor(i L / n) to ceil((i + 1) L / n). Pixel p of the large one sits at
    (p + ½) n / L - ½ of the small one, and beyond the outermost pixels takes their value.
    """
    for axis in (0, 1):
        length = frame.shape[axis]
        n = length // factor
        rows = np.moveaxis(frame, axis, 0)
        means = [rows[i * length // n : -(-(i + 1) * length // n)].mean(0) for i in range(n)]
        frame = np.moveaxis(np.stack(means), 0, axis)
        rows = np.moveaxis(frame, axis, 0)
        large = []
        for p in range(length):
            at = min(max((p + 0.5) * n / length - 0.5, 0.0), n - 1.0)
            low = int(at)
            high = min(low + 1, n - 1)
            large.append((1 - (at - low)) * rows[low] + (at - low) * rows[high])
        frame = np.moveaxis(np.stack(large), 0, axis)
    return frame


def detail(video: Array, distance: Callable[[Array, Array], float]) -> float:
    """Mean over the factors 8, 16, 32 of the mean over frames of the distance from a frame to its coarse self."""
    return float(np.mean([[distance(frame, coarse(frame, factor)) for frame in video] for factor in (8, 16, 32)]))


def hd_mse(video: Array) -> float:
    return detail(video, lambda a, b: float(np.mean((a - b) ** 2)))


def conv(x: Array, kernel: Array, bias: Array, stride: int, padding: int) -> Array:
    """(C, H, W) → (O, H', W'), zeros around."""
    size = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:])
    found = np.zeros((len(kernel), height, width))
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
            found += np.einsum("oc,chw->ohw", kernel[:, :, i, j], part)
    return found + bias[:, None, None]


def pool(x: Array, window: int) -> Array:
    """Maximum over squares of `window`, stride 2; what fills no square is left out."""
    height, width = ((n - window) // 2 + 1 for n in x.shape[1:])
    cut = [
        x[:, i : i + 2 * (height - 1) + 1 : 2, j : j + 2 * (width - 1) + 1 : 2]
        for i in range(window)
        for j in range(window)
    ]
    return np.max(cut, axis=0)


ALEX = (((0, 4, 2),), "pool3", ((3, 1, 2),), "pool3", ((6, 1, 1),), ((8, 1, 1),), ((10, 1, 1),))
"""(number, stride, padding) of the convolutions of each stage, and the pooling between."""
VGG = (
    ((0, 1, 1), (2, 1, 1)),
    "pool2",
    ((5, 1, 1), (7, 1, 1)),
    "pool2",
    ((10, 1, 1), (12, 1, 1), (14, 1, 1)),
    "pool2",
    ((17, 1, 1), (19, 1, 1), (21, 1, 1)),
    "pool2",
    ((24, 1, 1), (26, 1, 1), (28, 1, 1)),
)


def lpips(a: Array, b: Array, tensors: Mapping[str, Array], layout: Sequence[object]) -> float:
    """Zhang et al. 2018, equation 1, of two frames (H, W, 3) of 0..255."""

    def stages(frame: Array) -> list[Array]:
        x = np.moveaxis(frame / 127.5 - 1, -1, 0)
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        found = []
        for step in layout:
            if isinstance(step, str):
                x = pool(x, int(step[-1]))
                continue
            for number, stride, padding in step:
                kernel, bias = tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"]
                x = np.maximum(conv(x, kernel, bias, stride, padding), 0)
            found.append(x)
        return found

    total = 0.0
    for stage, (x, y) in enumerate(zip(stages(a), stages(b), strict=True)):
        x, y = (z / np.sqrt(1e-8 + np.sum(z * z, 0)) for z in (x, y))
        weight = tensors[f"lin{stage}.model.1.weight"].reshape(-1, 1, 1)
        total += float(np.mean(np.sum(weight * (x - y) ** 2, 0)))
    return total


def frechet(a: Array, b: Array) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½) of two sets of vectors (n, F), by the eigenvalues of the plain product."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s) + np.trace(t) - 2 * roots.sum())
