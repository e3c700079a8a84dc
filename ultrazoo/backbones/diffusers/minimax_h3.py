"""diffusers' `MiniMaxH3Transformer3DModel` (MiniMax-H3): one packed sequence of text, conditions, audio and video.

The caller says where every row lies, in the sequence and in (t, h, w); the grid is read from that. The target is the last
unbroken run of video rows, as the pipelines lay it out; rows of text, audio, keyframes and references are extra tokens.
The text refiner keeps its own attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import Problem, UsageError
from ...grid import Grid
from ...spec import Rope, Segment, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .packed import Beside, PackedProcessor, Raster, Run, rasters
from .processor import refuse_mask, turned_pairs

CLIP = 17
"""Frames that the VAE makes into one group of latents: the first latent stands for one of them, the others for four."""
FRAME = 5 / 3
LATENT = 4
"""Most frames that a latent stands for."""
"""Units of the time axis in a frame of video, at 24 frames a second; 40 units are a second, and so are 40 audio latents."""
SPAN = 32.0
"""Units of height and of width of a square picture."""
VOICES = 2
"""Channels of the sound, one after the other in the sequence."""


class GroupedGeometry(Geometry):
    """Latents in groups of ``ceil(17 / stride)``; a video is whole groups and the 2 latents by which groups overlap."""

    @property
    def _group(self) -> int:
        return -(-CLIP // self.strides[0])

    def latent_frames(self, frames: int) -> int:
        groups, rest = divmod(frames, CLIP)
        return groups * self._group + (1 + (rest - 1) // self.strides[0] if rest else 0)

    def frames(self, latents: int) -> int:
        groups, rest = divmod(latents, self._group)
        return groups * CLIP + (1 + (rest - 1) * self.strides[0] if rest else 0)

    def _least(self) -> int:
        """Frames of the shortest video, which is one group and the overlap."""
        return self.frames(self._group + 2)

    def _legal_frames(self, frames: int) -> bool:
        return frames >= self._least() and (frames - self._least()) % CLIP == 0

    def _illegal_frames(self, frames: int) -> Problem:
        least = self._least()
        rule = f"{frames} is not {least} or more by a multiple of {CLIP}: the VAE cannot make it"
        if frames < least:
            return Problem("frames", rule, f"nearest legal: {least}")
        below = least + (frames - least) // CLIP * CLIP
        return Problem("frames", rule, f"nearest legal: {below} or {below + CLIP}")


class MiniMaxH3Processor(PackedProcessor):
    """(B, S, C) → (B, S, C); norms per head, the first channels of a head turn in halves."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        rotary_emb: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        refuse_mask(attention_mask, "MiniMaxH3Transformer3DModel")
        cos, sin = rotary_emb

        def turn(run: Run) -> Callable[[Tensor], Tensor]:
            rows = slice(run.start, run.stop)
            return turned_pairs(cos[rows, None], sin[rows, None], "halves")

        return self.packed(hidden_states, self.host(attn), turn)


class MiniMaxH3Adapter(Adapter):
    """`transformer_blocks.N.attn`. Rows of a batch share one layout; `timestep` counts up to 1, which is clean."""

    model: ClassVar[str] = "MiniMaxH3Transformer3DModel"
    streams: ClassVar[str] = "text, audio, keyframes and references: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        return GroupedGeometry((4, 16, 16), tuple(config["patch_size"]), causal=True)

    def site(self, config: Config) -> Site:
        axis = 2 * config["rope_freq_dim"]
        rope = Rope(axes=(axis, axis, axis), base=config["rope_theta"], pairing="halves")
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return Site(dim=config["hidden_size"], heads=heads, head_dim=head_dim, qk_norm=True, rope=rope)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        # audio depends on the length of the video; its rows are priced with the layer's other modules
        return (Segment("text", text_tokens),)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        # angles are made of fp32 positions
        places = arguments["position_ids"].float()
        target = self._target(places, arguments["video_indices"])
        start, stop = target.start, target.stop
        batch = arguments["hidden_states"].shape[0]
        steps = (1 - arguments["timestep"][arguments["timestep_indices"][start:stop]]) * 1000
        alike = bool((steps == steps[0]).all())
        t, h, w = (axis.to(places.device) for axis in target.axes)
        return Frame(
            target.grid,
            (steps[0] if alike else steps).expand(batch, *steps.shape[alike:]),
            start=start,
            coordinates=(t, h, w),
            own=Beside(_around(arguments, places, start, stop)),
        )

    def _target(self, places: Tensor, indices: Tensor) -> Raster:
        """The grid of the last unbroken run of video rows. Raises UsageError where those rows are not in its order."""
        rows = indices.detach().cpu()
        step = rows[1:] - rows[:-1]
        if not len(rows) or bool((step <= 0).any()):
            raise UsageError(f"{self.model}: video_indices must rise from row to row, and name one row or more")
        breaks = torch.nonzero(step != 1)[:, 0]
        first = int(rows[int(breaks[-1]) + 1 if len(breaks) else 0])
        count = int(rows[-1]) + 1 - first
        found = rasters(places[first : first + count])
        last = found[-1] if found else None
        held = 0 if last is None or last.stop != count else last.stop - last.start
        # keyframes may come right before the target
        if last is None or 2 * held < count:
            raise UsageError(
                f"{self.model}: of the last {count} video rows in a row, {held} at the end lie on a (T, H, W) grid; they "
                "must come in order of time, height and width, and the target must be half of them or more"
            )
        return last._replace(start=first + last.start)

    def processor(self, group: str) -> type[nn.Module]:
        return MiniMaxH3Processor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        """As the pipeline lays out a clip with its sound: text, audio, video."""
        geometry = self.geometry(config)
        sound = round(geometry.frames(geometry.latent(grid)[0]) * FRAME)
        words = torch.stack([torch.arange(text_tokens), *torch.zeros(2, text_tokens)], dim=-1)
        video = clip(grid, text_tokens)
        heard = torch.zeros(VOICES, sound, 3, dtype=torch.float64)
        heard[..., 0] = torch.arange(sound) + text_tokens
        heard[..., 2] = torch.stack([video[0, 2], video[-1, 2]])[:, None]
        x = make(batch, grid.tokens, config["in_channels"] * geometry.patch[0] * geometry.patch[1] * geometry.patch[2])
        packed = layout(("text", words), ("audio", heard.flatten(0, 1)), ("video", video))
        indices = torch.zeros_like(packed["token_tags"])
        return {
            "hidden_states": x,
            "audio_hidden_states": make(batch, VOICES * sound, config["audio_in_channels"]),
            "encoder_hidden_states": make(batch, text_tokens, config["text_dim"]),
            "timestep": make(1).abs() / 4,
            "timestep_indices": indices.to(x.device),
            **{name: one.to(x.device) for name, one in packed.items()},
        }


TAGS = {"video": 0, "text": 1, "audio": 2}


def layout(*segments: tuple[str, Tensor]) -> dict[str, Tensor]:
    """What a forward is told of rows (n, 3) of each kind, in the order given: positions, tags and indices by kind."""
    kinds = torch.cat([torch.full((len(rows),), TAGS[kind]) for kind, rows in segments])
    return {
        "position_ids": torch.cat([rows.double() for _, rows in segments]),
        "token_tags": kinds,
        **{f"{kind}_indices": torch.nonzero(kinds == tag)[:, 0] for kind, tag in TAGS.items()},
    }


def clip(grid: Grid, start: float) -> Tensor:
    """Positions (n, 3), fp64, of the rows of a clip that begins at `start`, one latent to a frame of the grid.

    A latent lasts as long as the frames that it stands for; pictures are centred, of area 32 x 32.
    """
    lasts = torch.tensor([FRAME * (LATENT if frame % 5 else 1) for frame in range(grid.t)], dtype=torch.float64)
    sides = [
        ((1 - n / (grid.h * grid.w) ** 0.5) / 2 + torch.arange(n, dtype=torch.float64) / (grid.h * grid.w) ** 0.5)
        * SPAN
        for n in (grid.h, grid.w)
    ]
    return torch.cartesian_prod(start + lasts.cumsum(0) - lasts, *sides).reshape(-1, 3)


KINDS = {"text_indices": "text", "audio_indices": "audio", "video_indices": "reference"}
"""Which argument names the rows of a kind. Tags do not: pictures inside the prompt have the video's."""


def _around(arguments: Mapping[str, Any], places: Tensor, start: int, stop: int) -> tuple[Run, ...]:
    """Runs of one kind before and after the grid's rows ``start:stop``; a row that nothing names is ``unnamed``. References
    are one run per clip or picture, with its grid."""
    names = [*KINDS.values(), "unnamed"]
    length = len(places)
    kinds = torch.full((length,), len(KINDS))
    for number, argument in enumerate(KINDS):
        kinds[arguments[argument].cpu()] = number
    found = []
    for first, last in ((0, start), (stop, length)):
        at = first
        values, counts = kinds[first:last].unique_consecutive(return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            run = Run(names[value], at, at + count)
            found += _shots(run, places) if run.kind == "reference" else [run]
            at += count
    return tuple(found)


def _shots(run: Run, places: Tensor) -> list[Run]:
    """The clips and pictures that a run holds, each with its grid; the run itself where other rows are among them. A clip's
    frames follow each other without a gap: two keyframes of one size are two pictures."""
    found, at = [], run.start
    for raster in rasters(places[run.start : run.stop]):
        if run.start + raster.start != at:
            return [run]
        _, height, width = raster.grid
        times = raster.axes[0]
        gaps = (torch.nonzero(times[1:] - times[:-1] > 1.01 * LATENT * FRAME)[:, 0] + 1).tolist()
        for first, last in itertools.pairwise([0, *gaps, len(times)]):
            rows = (last - first) * height * width
            found.append(Run(run.kind, at, at + rows, Grid(last - first, height, width)))
            at += rows
    return found if at == run.stop else [run]
