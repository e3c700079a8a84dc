"""diffusers' `LTXVideoTransformer3DModel` (LTX-Video, arXiv 2501.00103): video self-attention alone, over packed rows.

Positions are seconds and pixels. Where the caller gives them (`video_coords`), the target is the largest run of rows that
fills a grid; rows before it (the condition pipeline) and after it (windows of long videos) are extra tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...grid import Grid
from ...spec import Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .packed import Beside, PackedProcessor, Run, around, chosen, rasters, shared, steps_of
from .physical import PhysicalHost, physical_site, turned
from .processor import refuse_mask

THETA = 10000.0
BASES = (20, 2048, 2048)
"""What coordinates are a share of: seconds, pixels of height, pixels of width."""


class LTXVideoProcessor(PackedProcessor):
    """(B, S, C) → (B, S, C); norms across heads, rotation across heads, then split."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        refuse_mask(attention_mask, "LTXVideoTransformer3DModel")
        heads = self.attention.site.heads

        def turn(run: Run) -> Callable[[Tensor], Tensor]:
            # (B, S, C), each value twice
            cos, sin = (one[:, run.start : run.stop, ::2].unflatten(-1, (heads, -1)) for one in image_rotary_emb)
            return lambda z: turned(z, cos, sin, "interleaved")

        return self.packed(hidden_states, PhysicalHost(attn, self.frame, self.attention.site), turn)


class LTXVideoAdapter(Adapter):
    """`transformer_blocks.N.attn1`; the grid by num_frames, height, width, or by video_coords (B, 3, S)."""

    model: ClassVar[str] = "LTXVideoTransformer3DModel"
    streams: ClassVar[str] = "condition frames: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn1" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        return Geometry((8, 32, 32), self._patch(config), causal=True)

    def _patch(self, config: Config) -> tuple[int, int, int]:
        return (config["patch_size_t"], config["patch_size"], config["patch_size"])

    def site(self, config: Config) -> Site:
        return physical_site(config, THETA, "interleaved")

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        x, coords = arguments["hidden_states"], arguments["video_coords"]
        batch, length = x.shape[:2]
        if coords is None:
            grid = tuple(arguments[name] for name in ("num_frames", "height", "width"))
            if None in grid:
                raise UsageError(f"{self.model}: give num_frames, height and width (in latents), or video_coords")
            start = 0
            axes = self._axes(config, grid, arguments["rope_interpolation_scale"], x.device)
        else:
            places = torch.stack([coords[:, axis] / base for axis, base in enumerate(BASES)], dim=-1)
            found = chosen(rasters(shared(places, self.model)), length, self.model)
            grid, start = found.grid, found.start
            axes = tuple(axis.to(x.device) for axis in found.axes)
        t, h, w = grid
        stop = start + t * h * w
        steps = steps_of(arguments["timestep"], batch, start, stop, length)
        beside = Beside(around(start, stop, length, "condition"))
        return Frame((t, h, w), steps, start=start, coordinates=(axes[0], axes[1], axes[2]), own=beside)

    def _axes(self, config: Config, grid: Any, scale: Any, device: torch.device) -> tuple[Tensor, ...]:
        """Shares of the base lengths at which patches begin, rounded as the model rounds them."""
        # two places even of an axis of one, so that what lies between tokens is known to be close
        axes = [torch.arange(max(length, 2), dtype=torch.float32, device=device) for length in grid]
        if scale is None:
            return tuple(axes)
        patch = self._patch(config)
        return tuple(axes[i] * scale[i] * patch[i] / BASES[i] for i in range(3))

    def processor(self, group: str) -> type[nn.Module]:
        return LTXVideoProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        x = make(batch, grid.tokens, config["in_channels"])
        return {
            "hidden_states": x,
            "encoder_hidden_states": make(batch, text_tokens, config["caption_channels"]),
            "timestep": make(batch).abs() * 100,
            "encoder_attention_mask": x.new_ones(batch, text_tokens),
            "num_frames": grid.t,
            "height": grid.h,
            "width": grid.w,
            # 25 frames a second, eight to a latent
            "rope_interpolation_scale": (8 / 25, 32, 32),
        }
