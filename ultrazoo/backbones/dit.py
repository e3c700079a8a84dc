"""Class-conditional diffusion transformer with adaLN-zero (DiT; Peebles and Xie, arXiv 2212.09748), image and video.

Per layer: modulated self-attention and modulated feed-forward; shifts, scales and gates come from the sum of the time's
and the class's embedding through a projection per layer that starts at zero. Positions are sums of sines and cosines,
computed for whatever grid comes. Our additions: latents of any size and any number of frames. A frame at time t gets the
image's embedding plus ``sincos(t) - sincos(0)``, so that the first frame of a video is exactly an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..attention.contract import Call
from ..cost import companions
from ..errors import Problem, SiteError, UsageError
from ..grid import Grid
from ..ops.embed import sinusoid
from ..ops.init import Constant, Normal, Xavier, marked
from ..ports import Port
from ..spec import AttentionSpec, BackboneCost, BackboneSpec, Companion, Options, Site, Video, option
from .contract import Backbone, Steps
from .ffn import FFN, FfnSpec, MlpSpec, feed_forward
from .geometry import Geometry
from .host import ProjectedHost
from .layers import gated, modulate, start_linears, timestep_groups, tokens_of, traced, unpatchify, wide

TIME_CHANNELS = 256
"""Channels of the sinusoidal time embedding."""

_SIZES = {
    "xl": {"dim": 1152, "layers": 28, "heads": 16},
    "l": {"dim": 1024, "layers": 24, "heads": 16},
    "b": {"dim": 768, "layers": 12, "heads": 12},
    "s": {"dim": 384, "layers": 12, "heads": 6},
}


@dataclass(frozen=True, kw_only=True)
class Latent(Options):
    """What the VAE makes of an image or a video."""

    strides: tuple[int, int, int] = option((1, 8, 8), "strides of the VAE over (T, H, W)", ge=1)
    channels: int = option(4, "latent channels", ge=1)
    causal: bool = option(False, "the first frame is a latent frame of its own")


@dataclass(frozen=True, kw_only=True)
class DitSpec(BackboneSpec):
    """Dimensions of a DiT and of the VAE in front of it. The defaults are DiT-XL/2 at 256 pixels."""

    name: ClassVar[str] = "dit"
    source: ClassVar[str] = "arXiv:2212.09748"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # trained at 256 pixels: 32 latents a side
        f"{size}_{patch}": {**fields, "patch": patch, "trained": (1, 32 // patch, 32 // patch)}
        for size, fields in _SIZES.items()
        for patch in (2, 4, 8)
    }

    dim: int = option(1152, "channels of the stream; a multiple of 4", ge=4)
    layers: int = option(28, "transformer layers", ge=1)
    heads: int = option(16, "attention heads; they divide dim", ge=1)
    ffn_ratio: int = option(4, "hidden channels of the feed-forward mlp over dim", ge=1)
    ffn: FfnSpec = option(MlpSpec(), "the feed-forward of every layer", choices=FFN)
    patch: int = option(2, "latents per token along H and W", ge=1)
    classes: int = option(1000, "classes; the label after the last means no class", ge=1)
    latent: Latent = option(Latent(), "strides and channels of the VAE")
    outputs: int = option(2, "output channels per latent channel: 2 with a learned variance, else 1", ge=1, le=2)
    positions: Literal["index", "fit"] = option("index", "position of token i: i, or i scaled to the trained grid")
    trained: tuple[int, int, int] | None = option(None, "grid the weights were trained at, for positions: fit", ge=1)
    eps: float = option(1e-6, "epsilon of the norms", gt=0)
    ffn_chunk: int | None = option(None, "tokens that go through the feed-forward at a time; null means all", ge=1)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.latent.strides, (1, self.patch, self.patch), self.latent.causal)

    def problems(self, site: Site | None = None) -> list[Problem]:
        found = []
        if self.dim % self.heads:
            found.append(Problem("heads", f"{self.heads} heads do not divide dim {self.dim}", "change heads or dim"))
        if self.dim % 4:
            rule = f"{self.dim} is not a multiple of 4: positions are sines and cosines over two axes"
            found.append(Problem("dim", rule, f"use {-(-self.dim // 4) * 4}"))
        if self.positions == "fit" and self.trained is None:
            found.append(Problem("positions", "'fit' scales positions to the trained grid", "give trained: [T, H, W]"))
        return found + self.ffn.problems_at(self.dim, self.ffn_chunk)

    def groups(self) -> dict[str, int]:
        return {"": self.layers}

    def grid(self, video: Video) -> tuple[Grid | None, list[Problem]]:
        return self.geometry.grid(video)

    def sites(self, grid: Grid) -> tuple[Site, ...]:
        site = Site(
            dim=self.dim, heads=self.heads, head_dim=self.dim // self.heads, layers=self.layers, grid=grid, rope=None
        )
        return tuple(site.at(layer=layer) for layer in range(self.layers))

    def ports(self, image: bool) -> tuple[Port, ...]:
        frames: tuple[tuple[str, int], ...] = () if image else (("t", 1),)
        return (
            Port("latents", (("b", 1), self.latent.channels, *frames, ("h", self.patch), ("w", self.patch))),
            Port("timestep", (("b", 1),), "timestep"),
            Port("labels", (("b", 1),), "label", below=self.classes + 1),
        )

    def cost(self, grid: Grid) -> BackboneCost:
        """FLOPs, parameters and elements of `Dit.forward`, batch 1, one timestep per sample.

        Elements are of the model's dtype; what is fp32 beside a 16-bit stream counts twice.
        """
        C, N, hidden = self.dim, grid.tokens, self.dim * self.ffn_ratio
        patch = self.patch**2 * self.latent.channels
        linear = C * C + C
        layer = 4 * linear + self.ffn.parameters(C, hidden) + 6 * linear
        outside = patch * C + C + TIME_CHANNELS * C + C + linear + (self.classes + 1) * C
        outside += 2 * linear + (C + 1) * patch * self.outputs
        ffn = self.ffn.peak_elements(C, hidden, N, self.ffn_chunk)
        return BackboneCost(
            parameters=self.layers * layer + outside,
            layer_flops=(self.ffn.flops(C, hidden, N) + 12 * C * C,) * self.layers,
            outside_flops=2 * N * C * patch * (1 + self.outputs) + 2 * (TIME_CHANNELS * C + C * C) + 4 * C * C,
            # the residual stream and the input of the running sub-layer, the condition
            stream_elements=2 * N * C + C,
            # the caller still holds the layer's input; then the feed-forward, or the gated sum in fp32
            layer_peak_elements=(N * C + max(ffn, 3 * N * C),) * self.layers,
            # inputs and results of two norms (4), what attention and feed-forward return (2) and the latter's input
            layer_saved_elements=(7 * N * C + self.ffn.saved_elements(C, hidden, N),) * self.layers,
        )

    def companions(self, grid: Grid, prompts: int = 1) -> tuple[Companion, ...]:
        """The released models' VAE, where the latents are its own; classes need no text encoder."""
        if self.latent.strides != (1, 8, 8) or self.latent.channels != 4:
            return ()
        return (companions.sd_vae(Grid(grid.t, grid.h * self.patch, grid.w * self.patch)),)


class DitBlock(nn.Module):
    """One layer: x (B, N, C), condition (B, G, C) → (B, N, C)."""

    def __init__(self, spec: DitSpec, site: Site, attention: nn.Module):
        super().__init__()
        self.eps = spec.eps
        self.ffn_chunk = spec.ffn_chunk
        self.self_attn = ProjectedHost(site, spec.eps)
        self.attention = attention
        self.ffn = spec.ffn.build(spec.dim, spec.dim * spec.ffn_ratio)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(spec.dim, 6 * spec.dim))

    def forward(self, x: Tensor, condition: Tensor, call: Call) -> Tensor:
        # six times (B, G, C)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(condition).to(wide(x.dtype)).chunk(6, -1)
        x = gated(x, gate, self.attention(modulate(x, shift, scale, self.eps), self.self_attn, call))
        y = feed_forward(self.ffn, modulate(x, ffn_shift, ffn_scale, self.eps), call.grid, self.ffn_chunk)
        return gated(x, ffn_gate, y)


class DitHead(nn.Module):
    """The way out: x (B, N, C), condition (B, G, C) → (B, N, channels of a patch)."""

    def __init__(self, dim: int, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).to(wide(x.dtype)).chunk(2, -1)
        return self.head(modulate(x, shift, scale, self.eps))  # type: ignore[no-any-return]


class Dit(Backbone):
    """``model(latents, timestep, labels)`` → predicted noise, followed by the variance where `outputs` is 2.

    latents (B, channels, h, w) for images or (B, channels, F, h, w); timestep on the 0..1000 scale, (B,), per frame
    (B, T) or per token (B, N); labels (B,) integers, `classes` itself meaning no class. The result has the shape of
    `latents` with ``outputs * channels`` channels.
    Raises SiteError at a size that the attentions or the patches do not allow, UsageError for other wrong shapes.
    """

    spec: DitSpec

    def __init__(self, spec: DitSpec, attention: Sequence[AttentionSpec], grid: Grid, steps: Steps = ()):
        super().__init__(spec, attention, grid, steps)
        C, patch = spec.dim, (1, spec.patch, spec.patch)
        self.patch_embedding = nn.Conv3d(spec.latent.channels, C, patch, stride=patch)
        self.time_embedding = nn.Sequential(nn.Linear(TIME_CHANNELS, C), nn.SiLU(), nn.Linear(C, C))
        self.label_embedding = nn.Embedding(spec.classes + 1, C)
        self.blocks = nn.ModuleList(DitBlock(spec, site, self.attention_of(site.layer)) for site in spec.sites(grid))
        self.head = DitHead(C, spec.patch**2 * spec.latent.channels * spec.outputs, spec.eps)
        start_linears(self, weight=Xavier(), bias=Constant(0.0))
        start_linears(self.time_embedding, weight=Normal(0.02), bias=Constant(0.0))
        for block in self.blocks:
            start_linears(block.get_submodule("modulation"), weight=Constant(0.0), bias=Constant(0.0))
        start_linears(self.head, weight=Constant(0.0), bias=Constant(0.0))
        marked(self.label_embedding, weight=Normal(0.02))

    def forward(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        self._check(latents, timestep, labels)
        image = latents.ndim == 4
        latents = latents[:, :, None] if image else latents
        grid = tokens_of(latents, self.spec.geometry.patch)
        labelled = self.label_embedding(labels)
        time = self.time_embedding(sinusoid(timestep_groups(timestep, grid), TIME_CHANNELS, labelled.dtype))
        # (B, G, C) + (B, 1, C)
        condition = time + labelled[:, None]
        # not through a variable here, which would keep the first tokens alive until the last layer
        x = self.run_blocks(self._embed(latents, grid), grid, timestep, condition)
        y = unpatchify(self.head(x, condition), grid, self.spec.geometry.patch)
        return y[:, :, 0] if image else y

    def _embed(self, latents: Tensor, grid: tuple[int, int, int]) -> Tensor:
        # (B, C, T, H, W) → (B, T, H, W, C) → (B, N, C)
        x = self.patch_embedding(latents).permute(0, 2, 3, 4, 1)
        return (x + self._positions(grid, x)).flatten(1, 3)  # type: ignore[no-any-return]

    def _positions(self, grid: tuple[int, int, int], like: Tensor) -> Tensor:
        """(T, H, W, C): columns in the first half of the channels, rows in the second, time added over all."""
        t, h, w = grid
        across, down = (_sincos(self._axis(axis, grid, like), like.shape[-1] // 2) for axis in (2, 1))
        frame = torch.cat([across[None].expand(h, -1, -1), down[:, None].expand(-1, w, -1)], dim=-1)
        moments = _sincos(torch.arange(t, device=like.device, dtype=torch.float64), like.shape[-1])
        return (frame + (moments - moments[:1])[:, None, None]).to(like.dtype)

    def _axis(self, axis: int, grid: tuple[int, int, int], like: Tensor) -> Tensor:
        index = torch.arange(grid[axis], device=like.device, dtype=torch.float64)
        if self.spec.positions == "index" or self.spec.trained is None:
            return index
        return index * (self.spec.trained[axis] / grid[axis])

    def _check(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> None:
        spec = self.spec
        if latents.ndim not in (4, 5) or latents.shape[1] != spec.latent.channels:
            raise UsageError(
                f"latents have shape {tuple(latents.shape)}; they are (B, {spec.latent.channels}, h, w) or "
                f"(B, {spec.latent.channels}, F, h, w)"
            )
        if traced():
            return
        frames = latents.shape[2] if latents.ndim == 5 else 1
        size = (frames, latents.shape[-2], latents.shape[-1])
        if found := spec.geometry.latent_problems(size):
            raise SiteError(f"{spec.name} at latents {size}", found)
        batch = latents.shape[0]
        if labels.shape != (batch,) or timestep.shape[:1] != (batch,):
            raise UsageError(
                f"batch sizes differ: latents {tuple(latents.shape)}, timestep {tuple(timestep.shape)}, "
                f"labels {tuple(labels.shape)}"
            )


def _sincos(positions: Tensor, channels: int) -> Tensor:
    """(n,) → (n, channels) = [sin | cos], base 10000, fp64."""
    cosines, sines = sinusoid(positions, channels, torch.float64).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


DitSpec.module = Dit
