"""diffusers' `LTX2VideoTransformer3DModel` (LTX-2, arXiv 2601.03233, to 2.5): video self-attention over packed rows.

Positions are the middles of patches in seconds and pixels. Keyframes and references that pipelines append after the target
are extra tokens. Gates per head and perturbed blocks (values in place of attention) are served; audio and every
cross-attention keep their own.
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
from .host import ModuleHost
from .packed import Beside, PackedProcessor, Raster, Run, around, chosen, rasters, shared, steps_of
from .physical import PhysicalHost, physical_site, turned


class GatedHost(PhysicalHost):
    """A host whose output is, by row, mixed with the raw values and gated by head before the projection.

    `gates` (B, n, heads) or None. `mixed`: None, or values (B, n, heads*D) and the share of attention, broadcast to them.
    """

    gates: Tensor | None = None
    mixed: tuple[Tensor, Tensor] | None = None

    def out(self, y: Tensor) -> Tensor:
        if self.mixed is not None:
            y = torch.lerp(self.mixed[0], y, self.mixed[1].to(y.dtype))
        if self.gates is not None:
            y = (y.unflatten(-1, (-1, self.site.head_dim)) * self.gates[..., None]).flatten(-2)
        return super().out(y)

    def rows_of(self, start: int, stop: int) -> GatedHost:
        """The host of rows ``start:stop``."""
        found = GatedHost(self.attn, self.frame, self.site, double=self.double)
        found.gates = None if self.gates is None else self.gates[:, start:stop]
        found.mixed = None if self.mixed is None else (self.mixed[0][:, start:stop], self.mixed[1])
        return found


class LTX2VideoProcessor(PackedProcessor):
    """(B, S, C) → (B, S, C); norms across heads, rotation interleaved across heads or in halves of a head."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        # attention_mask is the forward's video_self_attention_mask, which the frame has read
        x, site, config = hidden_states, self.attention.site, self.installed.config
        host = GatedHost(attn, self.frame, site, double=config["rope_double_precision"])
        if attn.to_gate_logits is not None:
            host.gates = 2 * torch.sigmoid(attn.to_gate_logits(x))
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool((perturbation_mask == 0).all())
        if all_perturbed:
            return host.out(host.project(x, "v"))
        if perturbation_mask is not None:
            host.mixed = (host.project(x, "v"), perturbation_mask)
        pairing = config["rope_type"]

        def turn(run: Run) -> Callable[[Tensor], Tensor]:
            if pairing == "split":
                # (B, heads, S, D/2)
                cos, sin = (one[:, :, run.start : run.stop].transpose(1, 2) for one in query_rotary_emb)
                return lambda z: turned(z, cos, sin, "halves")
            # (B, S, C), each value twice
            cos, sin = (one[:, run.start : run.stop, ::2].unflatten(-1, (site.heads, -1)) for one in query_rotary_emb)
            return lambda z: turned(z, cos, sin, "interleaved")

        return self.packed(x, host, turn)

    def at(self, host: ModuleHost, start: int, stop: int) -> ModuleHost:
        assert isinstance(host, GatedHost)
        return host.rows_of(start, stop)


class LTX2VideoAdapter(Adapter):
    """`transformer_blocks.N.attn1`; the target comes first, its grid by num_frames, height, width or by video_coords."""

    model: ClassVar[str] = "LTX2VideoTransformer3DModel"
    streams: ClassVar[str] = "keyframes and references: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn1" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        t, h, w = config["vae_scale_factors"]
        return Geometry((t, h, w), self._patch(config), causal=True)

    def _patch(self, config: Config) -> tuple[int, int, int]:
        return (config["patch_size_t"], config["patch_size"], config["patch_size"])

    def site(self, config: Config) -> Site:
        pairing = "halves" if config["rope_type"] == "split" else "interleaved"
        return physical_site(config, config["rope_theta"], pairing)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        x, coords = arguments["hidden_states"], arguments["video_coords"]
        batch, length = x.shape[:2]
        grid, axes, start = self._sizes(config, arguments), None, 0
        if coords is not None:
            found = self._target(config, coords, length, grid)
            grid, axes, start = found.grid, tuple(axis.to(x.device) for axis in found.axes), found.start
        elif grid is not None:
            axes = self._axes(config, grid, arguments["fps"], x.device)
        else:
            raise UsageError(f"{self.model}: give num_frames, height and width (in latents), or video_coords")
        assert axes is not None
        t, h, w = grid
        stop = start + t * h * w
        steps = steps_of(arguments["timestep"], batch, start, stop, length) * 1000 / config["timestep_scale_multiplier"]
        mask, refused = _key_mask(arguments["video_self_attention_mask"])
        beside = Beside(around(start, stop, length, "reference"), mask, refused)
        return Frame((t, h, w), steps, start=start, coordinates=(axes[0], axes[1], axes[2]), own=beside)

    def _sizes(self, config: Config, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """The token grid that the call names; None where it does not."""
        given = [arguments[name] for name in ("num_frames", "height", "width")]
        if None in given:
            return None
        t, h, w = (-(-size // patch) for size, patch in zip(given, self._patch(config), strict=True))
        return t, h, w

    def _bases(self, config: Config) -> tuple[int, int, int]:
        return config["pos_embed_max_pos"], config["base_height"], config["base_width"]

    def _target(self, config: Config, coords: Tensor, length: int, grid: tuple[int, int, int] | None) -> Raster:
        """The target's rows by their coordinates (B, 3, S) or, as bounds of patches, (B, 3, S, 2)."""
        middle, lasting = coords, None
        if coords.ndim == 4:
            middle = (coords[..., 0] + coords[..., 1]) / 2.0
            lasting = (coords[0, 0, :, 1] - coords[0, 0, :, 0]).cpu()
        places = torch.stack([middle[:, axis] / base for axis, base in enumerate(self._bases(config))], dim=-1)
        rows = shared(places, self.model)
        if grid is None:
            return chosen(rasters(rows, lasting), length, self.model)
        tokens = grid[0] * grid[1] * grid[2]
        runs = rasters(rows[:tokens])
        if len(runs) != 1 or runs[0].grid != tuple(grid):
            raise UsageError(
                f"{self.model}: the first {tokens} rows of video_coords are not the grid {tuple(grid)} that num_frames, "
                "height and width give, in order of time, height and width"
            )
        return runs[0]

    def _axes(self, config: Config, grid: Any, fps: float, device: torch.device) -> tuple[Tensor, ...]:
        """Middles of patches as shares of the base lengths, rounded as the model rounds them."""
        found = []
        for axis, (length, patch, stride, base) in enumerate(
            zip(grid, self._patch(config), config["vae_scale_factors"], self._bases(config), strict=True)
        ):
            # two places even of an axis of one, so that what lies between tokens is known to be close
            start = torch.arange(max(length, 2), dtype=torch.float32, device=device) * patch
            bounds = [start * stride, (start + patch) * stride]
            if axis == 0:
                # the VAE makes one frame of the first latent
                bounds = [(bound + config["causal_offset"] - stride).clamp(min=0) / fps for bound in bounds]
            found.append((bounds[0] + bounds[1]) / 2.0 / base)
        return tuple(found)

    def processor(self, group: str) -> type[nn.Module]:
        return LTX2VideoProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        t, h, w = self.geometry(config).latent(grid)
        x = make(batch, grid.tokens, config["in_channels"])
        # a second is 24 frames and, by default, 25 rows of audio
        rate = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
        sound = max(1, round(((t - 1) * config["vae_scale_factors"][0] + 1) / 24 * rate))
        projected = config["use_prompt_embeddings"]
        text = config["caption_channels"] if projected else config["cross_attention_dim"]
        spoken = config["caption_channels"] if projected else config["audio_cross_attention_dim"]
        return {
            "hidden_states": x,
            "audio_hidden_states": make(batch, sound, config["audio_in_channels"]),
            "encoder_hidden_states": make(batch, text_tokens, text),
            "audio_encoder_hidden_states": make(batch, text_tokens, spoken),
            "timestep": make(batch).abs() * 100,
            "sigma": make(batch).abs() * 100,
            "encoder_attention_mask": x.new_ones(batch, text_tokens),
            "audio_encoder_attention_mask": x.new_ones(batch, text_tokens),
            "num_frames": t,
            "height": h,
            "width": w,
            "audio_num_frames": sound,
        }


def _key_mask(mask: Tensor | None) -> tuple[Tensor | None, str | None]:
    """A mask (B, S, S) of ones and zeros as what it hides from all queries alike, (B, S), or why it is none."""
    if mask is None:
        return None, None
    if not torch.equal(mask, mask[:, :1].expand_as(mask)) or not bool(((mask == 0) | (mask == 1)).all()):
        return None, (
            "video_self_attention_mask differs between queries, or weakens tokens in part; only tokens hidden from every "
            "query are served: leave attention strength at 1, or run the model's own attention (original)"
        )
    keys = mask[:, 0] == 1
    return (None, None) if bool(keys.all()) else (keys, None)
