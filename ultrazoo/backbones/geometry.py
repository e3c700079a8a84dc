"""From the size of a video to the token grid: VAE strides, transformer patches, and the nearest legal sizes.

Along an axis the VAE turns pixels (frames) into latents by its stride, the transformer turns latents into tokens by its
patch. A causal VAE keeps the first frame for itself: ``1 + (frames - 1) / stride`` latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Problem
from ..grid import Grid
from ..spec import Video


@dataclass(frozen=True)
class Geometry:
    """Strides of the VAE and patch of the transformer over (T, H, W); `causal` is about the VAE's first frame."""

    strides: tuple[int, int, int]
    patch: tuple[int, int, int]
    causal: bool

    def grid(self, video: Video) -> tuple[Grid | None, list[Problem]]:
        """The token grid of `video`, or None and every problem, paths relative to the video."""
        if video.grid is not None:
            problems = [
                Problem(name, "give either 'grid' or a size in pixels, not both", f"remove '{name}'")
                for name, given in (("width", video.width), ("height", video.height))
                if given is not None
            ]
            if video.frames != 1:
                problems.append(Problem("frames", "'grid' says how many frames there are already", "remove 'frames'"))
            return (None, problems) if problems else (video.grid, [])
        problems = []
        sizes = []
        for axis, name, pixels in ((1, "height", video.height), (2, "width", video.width)):
            if pixels is None:
                problems.append(Problem(name, f"the video has no {name}", "give width and height, or grid: [T, H, W]"))
                continue
            problem = self._not_a_multiple(name, pixels, axis)
            if problem:
                problems.append(problem)
            sizes.append(pixels // (self.strides[axis] * self.patch[axis]))
        if not self._legal_frames(video.frames):
            problems.append(self._illegal_frames(video.frames))
        if problems:
            return None, problems
        return Grid(-(-self.latent_frames(video.frames) // self.patch[0]), sizes[0], sizes[1]), []

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a legal number of frames."""
        if self.causal:
            return 1 + (frames - 1) // self.strides[0]
        return -(-frames // self.strides[0])

    def pixels(self, grid: Grid) -> tuple[int, int, int]:
        """Width, height and frames of the video behind a token grid."""
        latent = self.latent(grid)
        return latent[2] * self.strides[2], latent[1] * self.strides[1], self.frames(latent[0])

    def frames(self, latents: int) -> int:
        """Frames of the video behind latent frames."""
        return 1 + (latents - 1) * self.strides[0] if self.causal else latents * self.strides[0]

    def latent(self, grid: Grid) -> tuple[int, int, int]:
        """Latent frames, rows and columns (F, h, w) behind a token grid."""
        return (grid.t * self.patch[0], grid.h * self.patch[1], grid.w * self.patch[2])

    def latent_problems(self, size: tuple[int, int, int]) -> list[Problem]:
        """What is wrong with latents of (F, h, w): every axis must be a multiple of its patch."""
        problems = []
        for name, length, patch in zip(("F", "h", "w"), size, self.patch, strict=True):
            if length % patch or length < patch:
                rule = f"{length} is not a multiple of the patch, {patch}"
                problems.append(Problem(f"latents.{name}", rule, f"nearest legal: {_two(length, patch)}"))
        return problems

    def _not_a_multiple(self, name: str, pixels: int, axis: int) -> Problem | None:
        unit = self.strides[axis] * self.patch[axis]
        if pixels > 0 and pixels % unit == 0:
            return None
        rule = f"{pixels} is not a multiple of {unit} (VAE stride {self.strides[axis]} × patch {self.patch[axis]})"
        return Problem(name, rule, f"nearest legal: {_two(pixels, unit)}")

    def _legal_frames(self, frames: int) -> bool:
        return frames >= 1 and (not self.causal or (frames - 1) % self.strides[0] == 0)

    def _illegal_frames(self, frames: int) -> Problem:
        if frames < 1 or not self.causal:
            return Problem("frames", f"{frames} is not a number of frames", "nearest legal: 1")
        stride = self.strides[0]
        below = 1 + (frames - 1) // stride * stride
        rule = f"{frames} is not 1 more than a multiple of {stride}: the causal VAE cannot make it"
        return Problem("frames", rule, f"nearest legal: {below} or {below + stride}")


def _two(size: int, unit: int) -> str:
    """The two multiples of `unit` around `size`."""
    below = size // unit * unit
    return f"{below} or {below + unit}" if below > 0 else str(unit)
