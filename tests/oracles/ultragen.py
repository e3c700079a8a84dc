"""The UltraGen block as the paper states it and as its released code behaves, window by window.

Source: arXiv:2510.18775 sections 4.1-4.3 (`paper`); differences 1-8 of the code published with it (`released`). Written
apart from the general oracle of branches, on torch's own interpolation and convolution in fp64, so that the two check
each other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrazoo.testing import Case, affine, attend, dense_heads, extra_rows, plain, real_keys, scores

from .gates import mlp, per_token, sinusoid
from .names import stored


def ultragen(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Either variant at any layer: the released one keeps full attention in the first and last three layers."""
    options = plain(case.spec)
    released = options["variant"] == "released"
    if keeps_full(case.site.layer, case.site.layers, options):
        rows = dense_heads(case)
    else:
        rows = block(case, released, options["windows"], options["factor"])
    y = case.host.out(rows)
    extra = extra_rows(case)
    return y if extra is None else (y, extra)


def keeps_full(layer: int, layers: int, options: dict[str, Any]) -> bool:
    """The released code keeps layers 0, 1, 2 and 27, 28, 29 of its 30 full; the paper keeps none."""
    outer = 3 if options["variant"] == "released" else 0
    first = outer if options["full_first"] is None else options["full_first"]
    last = outer if options["full_last"] is None else options["full_last"]
    return layer < first or layer >= layers - last


def block(case: Case, released: bool, count: int = 4, coarse_factor: int = 4) -> Tensor:
    """Three branches and two gates: (B, N, heads*D). `count` is K."""
    odd = case.site.layer % 2
    near_count = count // 2 + odd
    valid = case.x.new_ones(case.x.shape[:2]) if case.key_valid is None else case.key_valid.to(case.x)
    video = (case.x * valid[..., None]).transpose(1, 2).reshape(case.x.shape[0], -1, *case.grid)
    local = windowed(case, video, "local", count + odd, released)
    local = back(local, case.grid)
    regional = down(case, video, "regional", 2, released)
    regional = up(case, windowed(case, regional, "regional", near_count, released), "regional", 2, released)
    coarse = down(case, video, "global", coarse_factor, released)
    coarse = up(case, windowed(case, coarse, "global", 1, released), "global", coarse_factor, released)

    assert case.timestep is not None
    wave = sinusoid(per_token(case.timestep, case.grid))
    weights = case.own("fuse.")
    a = torch.sigmoid(mlp(weights, "gates.0.", wave))
    b = torch.sigmoid(mlp(weights, "gates.1.", wave))
    local, regional, coarse = (z.flatten(2).transpose(1, 2) for z in (local, regional, coarse))
    near = b * local + (1 - b) * regional
    return a * near + (1 - a) * coarse if released else a * coarse + (1 - a) * near


def frames(z: Tensor) -> Tensor:
    """(B, C, T, H, W) → (B*T, C, H, W)."""
    return z.transpose(1, 2).flatten(0, 1)


def video_of(z: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) → (B, C, T, H, W)."""
    return z.unflatten(0, (batch, -1)).transpose(1, 2)


def back(z: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Resize every frame of (B, C, T, h, w) to the grid's height and width."""
    if z.shape[-2:] == grid[1:]:
        return z
    return video_of(F.interpolate(frames(z), size=grid[1:], mode="bilinear", align_corners=False), z.shape[0])


def down(case: Case, video: Tensor, name: str, k: int, released: bool) -> Tensor:
    """Depthwise k x k convolution with stride k per frame; the paper variant fills partial cells with the edge."""
    weights = case.own(f"branches.{stored(name)}.compress.conv.")
    z = frames(video)
    if not released:
        z = F.pad(z, (0, -z.shape[-1] % k, 0, -z.shape[-2] % k), mode="replicate")
    z = F.conv2d(z, weights["weight"], weights["bias"], stride=k, groups=z.shape[1])
    return video_of(z, video.shape[0])


def up(case: Case, z: Tensor, name: str, k: int, released: bool) -> Tensor:
    """Bilinear per frame, then a depthwise 3x3x3 convolution on the map of the grid's size."""
    weights = case.own(f"branches.{stored(name)}.lift.conv.")
    batch, (_, height, width) = z.shape[0], case.grid
    if released:
        z = back(z, case.grid)
    else:
        z = F.interpolate(frames(z), scale_factor=k, mode="bilinear", align_corners=False)
        z = video_of(z[..., :height, :width], batch)
    return F.conv3d(z, weights["weight"], weights["bias"], padding=1, groups=z.shape[1])


def nearest_multiple(size: int, count: int) -> int:
    """The multiple of `count` nearest to `size`; a tie goes down."""
    return count * max(1, math.ceil(size / count - 0.5))


def project(case: Case, which: str, x: Tensor, name: str, released: bool) -> Tensor:
    """Base projection plus the branch's low-rank term; the released global branch makes keys from the query matrix."""
    if name == "local":
        return case.host.raw(x, which)
    base = "q" if released and name == "global" and which == "k" else which
    weights = case.own(f"branches.{stored(name)}.adapt.{which}.")
    return case.host.raw(x, base) + affine(weights, "lora_B", affine(weights, "lora_A", x))


def windowed(case: Case, video: Tensor, name: str, count: int, released: bool) -> Tensor:
    """Self-attention in count x count windows that span all frames: (B, C, T, h, w) → (B, heads*D, T, h', w')."""
    batch, _, t, height, width = video.shape
    if released:
        size = (nearest_multiple(height, count), nearest_multiple(width, count))
        video = back(video, (t, *size))
        height, width = size
    cell = {"local": 1, "regional": 2, "global": getattr(case.spec, "factor", 4)}[name]
    valid = valid_cells(case, cell, (t, height, width))
    rows, columns = spans(height, count), spans(width, count)
    inner = case.site.inner
    out = video.new_zeros(batch, inner, t, height, width)
    for top, bottom in rows:
        for left, right in columns:
            box = video[..., top:bottom, left:right]
            x = box.flatten(2).transpose(1, 2)
            place = torch.tensor(
                [(f, y, x_) for f in range(t) for y in range(bottom - top) for x_ in range(right - left)],
                dtype=torch.float64,
            )
            q = case.host.split(project(case, "q", x, name, released), "q", place)
            k = case.host.split(project(case, "k", x, name, released), "k", place)
            v = case.host.split(project(case, "v", x, name, released), "v")
            real = valid[..., top:bottom, left:right].reshape(batch, 1, 1, -1)
            if case.extra is not None:
                real = torch.cat([real, real_keys(case)[..., case.x.shape[1] :]], -1)
                k, v = torch.cat([k, case.extra.k], 1), torch.cat([v, case.extra.v], 1)
            y = attend(scores(q, k, real), v)
            patch = y.transpose(1, 2).reshape(batch, inner, t, bottom - top, right - left)
            out = paste(out, patch, top, left)
    return out


def valid_cells(case: Case, cell: int, grid: tuple[int, int, int]) -> Tensor:
    """Bool (B, 1, t, h, w): whether any of a cell's cell x cell tokens is real; all of them when nobody said otherwise."""
    batch = case.x.shape[0]
    if case.key_valid is None:
        return torch.ones(batch, 1, *grid, dtype=torch.bool)
    full = case.key_valid.reshape(batch, *case.grid).double()
    pooled = F.max_pool2d(full, cell, ceil_mode=True)
    assert pooled.shape[1:] == grid, "invalid tokens and resized maps do not go together"
    return pooled[:, None] > 0


def paste(out: Tensor, patch: Tensor, top: int, left: int) -> Tensor:
    """`out` with `patch` added at (top, left), out of place."""
    bottom, right = top + patch.shape[-2], left + patch.shape[-1]
    return out + F.pad(patch, (left, out.shape[-1] - right, top, out.shape[-2] - bottom))


def spans(size: int, count: int) -> list[tuple[int, int]]:
    """Starts and ends of `count` balanced windows, the longer ones first."""
    out, start = [], 0
    for i in range(count):
        end = start + size // count + (1 if i < size % count else 0)
        out.append((start, end))
        start = end
    return out
