"""Wan 2.1 and 2.2 text-to-video transformer (Wan team, arXiv 2503.20314), native, with the original checkpoint's names.

Per layer: modulated self-attention, cross-attention to the text, modulated feed-forward; the modulation is one shared
projection of the diffusion time plus a table per layer. We depart from the original code in three places: latents of any
size run without a position table, the timestep may be given per sample, per frame or per token, and text is attended to
at the length given (pad it to 512 as the released models expect; pipelines do).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.contract import Call
from ..cost import companions
from ..errors import Problem, SiteError, UsageError
from ..grid import Grid
from ..kernels import attend
from ..ops.embed import sinusoid
from ..ops.init import Constant, Normal, Value, Xavier
from ..ports import Port
from ..spec import AttentionSpec, BackboneCost, BackboneSpec, Companion, Rope, Site, Video, option
from .contract import Steps
from .facade import Config, PipelineBackbone, Sample, refuse_attention_kwargs
from .ffn import FFN, FfnSpec, MlpSpec, feed_forward
from .geometry import Geometry
from .host import ProjectedHost
from .layers import (
    RMSNorm,
    gated,
    modulate,
    start_linears,
    timestep_groups,
    tokens_of,
    traced,
    unpatchify,
    wide,
)


@dataclass(frozen=True, kw_only=True)
class WanSpec(BackboneSpec):
    """Dimensions of a Wan transformer and of its VAE. The defaults are Wan2.1-T2V-1.3B."""

    name: ClassVar[str] = "wan"
    source: ClassVar[str] = "arXiv:2503.20314"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "t2v_1_3b": {"trained": (21, 30, 52)},
        "t2v_14b": {"dim": 5120, "layers": 40, "heads": 40, "ffn_dim": 13824, "trained": (21, 45, 80)},
        "ti2v_5b": {
            "dim": 3072,
            "layers": 30,
            "heads": 24,
            "ffn_dim": 14336,
            "channels": 48,
            "strides": (4, 16, 16),
            "trained": (31, 22, 40),
        },
    }

    dim: int = option(1536, "channels of the stream", ge=1)
    layers: int = option(30, "transformer layers", ge=1)
    heads: int = option(12, "attention heads; they divide dim", ge=1)
    ffn_dim: int = option(8960, "hidden channels of the feed-forward mlp", ge=1)
    ffn: FfnSpec = option(MlpSpec(), "the feed-forward of every layer", choices=FFN)
    channels: int = option(16, "latent channels", ge=1)
    text_dim: int = option(4096, "channels of the text embedding", ge=1)
    text_tokens: int = option(512, "text tokens that the cost counts", ge=1)
    time_dim: int = option(256, "channels of the sinusoidal time embedding; even", ge=2)
    strides: tuple[int, int, int] = option((4, 8, 8), "strides of the causal VAE over (T, H, W)", ge=1)
    patch: tuple[int, int, int] = option((1, 2, 2), "latents per token over (T, H, W)", ge=1)
    rope_base: float = option(10000.0, "base of the rotary embedding", gt=1)
    trained: tuple[int, int, int] | None = option(None, "grid the weights were trained at, for rope rules", ge=1)
    eps: float = option(1e-6, "epsilon of the norms", gt=0)
    ffn_chunk: int | None = option(None, "tokens that go through the feed-forward at a time; null means all", ge=1)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.strides, self.patch, causal=True)

    def problems(self, site: Site | None = None) -> list[Problem]:
        found = []
        if self.dim % self.heads:
            found.append(Problem("heads", f"{self.heads} heads do not divide dim {self.dim}", "change heads or dim"))
        elif self.head_dim % 2 or self.head_dim < 6:
            rule = f"dim / heads = {self.head_dim}, the rotary embedding over three axes needs an even number ≥ 6"
            found.append(Problem("heads", rule, "change heads or dim"))
        if self.patch[0] != 1:
            rule = f"{self.patch[0]} latent frames per token: the causal VAE's first frame is a latent frame of its own"
            found.append(Problem("patch", rule, f"use [1, {self.patch[1]}, {self.patch[2]}]"))
        if self.time_dim % 2:
            found.append(Problem("time_dim", f"{self.time_dim} is odd", f"use {self.time_dim + 1}"))
        return found + self.ffn.problems_at(self.dim, self.ffn_chunk)

    def groups(self) -> dict[str, int]:
        return {"": self.layers}

    def grid(self, video: Video) -> tuple[Grid | None, list[Problem]]:
        return self.geometry.grid(video)

    def sites(self, grid: Grid) -> tuple[Site, ...]:
        side = 2 * (self.head_dim // 6)
        rope = Rope(
            axes=(self.head_dim - 2 * side, side, side),
            base=self.rope_base,
            trained=None if self.trained is None else Grid(*self.trained),
        )
        site = Site(
            dim=self.dim,
            heads=self.heads,
            head_dim=self.head_dim,
            layers=self.layers,
            grid=grid,
            qk_norm=True,
            rope=rope,
        )
        return tuple(site.at(layer=layer) for layer in range(self.layers))

    def ports(self, image: bool) -> tuple[Port, ...]:
        t, h, w = self.patch
        return (
            Port("latents", (("b", 1), self.channels, ("t", t), ("h", h), ("w", w))),
            Port("timestep", (("b", 1),), "timestep"),
            Port("text", (("b", 1), ("text", 1), self.text_dim)),
        )

    def cost(self, grid: Grid) -> BackboneCost:
        """FLOPs, parameters and elements of `Wan.forward`, batch 1, one timestep per sample.

        Elements are of the model's dtype; what is fp32 beside a 16-bit stream counts twice.
        """
        C, N, L, hidden = self.dim, grid.tokens, self.text_tokens, self.ffn_dim
        patch = self.patch[0] * self.patch[1] * self.patch[2] * self.channels
        linear = C * C + C
        attention = 4 * linear + 2 * C
        layer = 2 * attention + 2 * C + 6 * C + self.ffn.parameters(C, hidden)
        outside = (patch * C + C) + (self.text_dim * C + C + linear) + (self.time_dim * C + C + linear)
        outside += 6 * linear + (C * patch + patch) + 2 * C
        cross = 4 * N * C * C + 4 * L * C * C + 4 * N * L * C
        time = 2 * (self.time_dim * C + C * C + 6 * C * C)
        ffn = self.ffn.peak_elements(C, hidden, N, self.ffn_chunk)
        # q, its fp32 copy and fp32 norm, the norm; the caller still holds the layer's input
        peak = N * C + max(ffn, 6 * N * C)
        # inputs and results of three norms (6), q before and after its norm with an fp32 copy (5), what attention and
        # feed-forward return (3); the feed-forward's own; text keys and values as the queries, and the text
        saved = 14 * N * C + self.ffn.saved_elements(C, hidden, N) + 8 * L * C
        return BackboneCost(
            parameters=self.layers * layer + outside,
            layer_flops=(cross + self.ffn.flops(C, hidden, N),) * self.layers,
            outside_flops=4 * N * C * patch + 2 * L * (self.text_dim * C + C * C) + time,
            # the residual stream and the input of the running sub-layer, the text, the modulation
            stream_elements=2 * N * C + L * C + 7 * C,
            layer_peak_elements=(peak,) * self.layers,
            layer_saved_elements=(saved,) * self.layers,
        )

    def companions(self, grid: Grid, prompts: int = 1) -> tuple[Companion, ...]:
        """The released models' text encoder, and the VAE whose strides and channels these are."""
        latent = Grid(grid.t * self.patch[0], grid.h * self.patch[1], grid.w * self.patch[2])
        vaes = {((4, 8, 8), 16): companions.wan21_vae, ((4, 16, 16), 48): companions.wan22_vae}
        vae = vaes.get((self.strides, self.channels))
        text = (companions.umt5_xxl(self.text_tokens, prompts),) if self.text_dim == 4096 else ()
        return text + ((vae(latent),) if vae is not None else ())


class WanCrossAttention(nn.Module):
    """Attention from the video to the text: x (B, N, C), text (B, L, C) → (B, N, C)."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps=eps)
        self.norm_k = RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        split = (self.heads, -1)
        # (B, n, C) → (B, heads, n, D)
        q = self.norm_q(self.q(x)).unflatten(2, split).transpose(1, 2)
        k = self.norm_k(self.k(text)).unflatten(2, split).transpose(1, 2)
        v = self.v(text).unflatten(2, split).transpose(1, 2)
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[union-attr, no-any-return]


class WanBlock(nn.Module):
    """One layer: x (B, N, C), text (B, L, C), time (B, G, 6, C) → (B, N, C)."""

    def __init__(self, spec: WanSpec, site: Site, attention: nn.Module):
        super().__init__()
        self.eps = spec.eps
        self.ffn_chunk = spec.ffn_chunk
        self.self_attn = ProjectedHost(site, spec.eps)
        self.attention = attention
        self.norm3 = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.cross_attn = WanCrossAttention(spec.dim, spec.heads, spec.eps)
        self.ffn = spec.ffn.build(spec.dim, spec.ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, spec.dim).normal_(0, spec.dim**-0.5))

    def initial_values(self) -> dict[str, Value]:
        return {"modulation": Normal(self.modulation.shape[-1] ** -0.5)}

    def forward(self, x: Tensor, text: Tensor, time: Tensor, call: Call) -> Tensor:
        def row(index: int) -> Tensor:
            # (1, 1, C) + (B, G, C)
            return self.modulation[:, index : index + 1].to(wide(x.dtype)) + time[:, :, index]

        shift, scale, gate = row(0), row(1), row(2)
        x = gated(x, gate, self.attention(modulate(x, shift, scale, self.eps), self.self_attn, call))
        x = x + self.cross_attn(self.norm3(x), text)
        shift, scale, gate = row(3), row(4), row(5)
        return gated(x, gate, feed_forward(self.ffn, modulate(x, shift, scale, self.eps), call.grid, self.ffn_chunk))


class WanHead(nn.Module):
    """The way out: x (B, N, C), time (B, G, C) → (B, N, channels of a patch)."""

    def __init__(self, dim: int, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim).normal_(0, dim**-0.5))

    def initial_values(self) -> dict[str, Value]:
        return {"modulation": Normal(self.modulation.shape[-1] ** -0.5)}

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, i : i + 1].to(wide(x.dtype)) + time for i in (0, 1))
        return self.head(modulate(x, shift, scale, self.eps))  # type: ignore[no-any-return]


class Wan(PipelineBackbone):
    """``model(latents, timestep, text)`` → the shape of `latents`: the predicted velocity.

    latents (B, channels, F, h, w); timestep on the 0..1000 scale, (B,), per frame (B, T) or per token (B, N); text
    (B, L, text_dim). Diffusers pipelines call it by keyword and take a one-tuple.
    Raises SiteError at a size that the attentions or the patches do not allow, UsageError for other wrong shapes.
    """

    spec: WanSpec

    def __init__(self, spec: WanSpec, attention: Sequence[AttentionSpec], grid: Grid, steps: Steps = ()):
        super().__init__(spec, attention, grid, steps)
        C = spec.dim
        patch = spec.patch[0] * spec.patch[1] * spec.patch[2] * spec.channels
        self.patch_embedding = nn.Conv3d(spec.channels, C, spec.patch, stride=spec.patch)
        self.text_embedding = nn.Sequential(nn.Linear(spec.text_dim, C), nn.GELU(approximate="tanh"), nn.Linear(C, C))
        self.time_embedding = nn.Sequential(nn.Linear(spec.time_dim, C), nn.SiLU(), nn.Linear(C, C))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.blocks = nn.ModuleList(WanBlock(spec, site, self.attention_of(site.layer)) for site in spec.sites(grid))
        self.head = WanHead(C, patch, spec.eps)
        self.config = _config(spec)
        start_linears(self, weight=Xavier(), bias=Constant(0.0))
        start_linears(self.text_embedding, weight=Normal(0.02), bias=Constant(0.0))
        start_linears(self.time_embedding, weight=Normal(0.02), bias=Constant(0.0))
        start_linears(self.head, weight=Constant(0.0), bias=Constant(0.0))

    def forward(
        self,
        latents: Tensor | None = None,
        timestep: Tensor | None = None,
        text: Tensor | None = None,
        *,
        hidden_states: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | Sample:
        refuse_attention_kwargs(attention_kwargs)
        if hidden_states is not None:
            # a pipeline's call; Sample is a tuple and has `.sample`, so `return_dict` makes no difference
            return Sample(self._run(hidden_states, timestep, encoder_hidden_states))
        if return_dict is not None:
            raise UsageError("return_dict belongs to the keyword call model(hidden_states=…, timestep=…, …)")
        return self._run(latents, timestep, text)

    def _run(self, latents: Tensor | None, timestep: Tensor | None, text: Tensor | None) -> Tensor:
        if latents is None or timestep is None or text is None:
            raise UsageError("a forward needs latents, timestep and text")
        self._check(latents, timestep, text)
        grid = tokens_of(latents, self.spec.patch)
        text = self.text_embedding(text)
        time = self.time_embedding(sinusoid(timestep_groups(timestep, grid), self.spec.time_dim, text.dtype))
        # (B, G, 6C) → (B, G, 6, C)
        rows = self.time_projection(time).unflatten(2, (6, -1))
        # not through a variable here, which would keep the first tokens alive until the last layer
        x = self.run_blocks(self._embed(latents), grid, timestep, text, rows)
        return unpatchify(self.head(x, time), grid, self.spec.patch)

    def _embed(self, latents: Tensor) -> Tensor:
        # (B, C, T, H, W) → (B, N, C), contiguous: every layer reads it token by token
        return self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # type: ignore[no-any-return]

    def _check(self, latents: Tensor, timestep: Tensor, text: Tensor) -> None:
        spec = self.spec
        if latents.ndim != 5 or latents.shape[1] != spec.channels:
            raise UsageError(f"latents have shape {tuple(latents.shape)}; they are (B, {spec.channels}, F, h, w)")
        if text.ndim != 3 or text.shape[2] != spec.text_dim:
            raise UsageError(f"text has shape {tuple(text.shape)}; it is (B, L, {spec.text_dim})")
        if traced():
            return
        size = (latents.shape[2], latents.shape[3], latents.shape[4])
        if found := spec.geometry.latent_problems(size):
            raise SiteError(f"{spec.name} at latents {size}", found)
        if len({latents.shape[0], timestep.shape[0] if timestep.ndim else 0, text.shape[0]}) > 1:
            raise UsageError(
                f"batch sizes differ: latents {tuple(latents.shape)}, timestep {tuple(timestep.shape)}, "
                f"text {tuple(text.shape)}"
            )


def _config(spec: WanSpec) -> Config:
    """The settings under the names of diffusers' ``WanTransformer3DModel``."""
    return Config(
        patch_size=spec.patch,
        num_attention_heads=spec.heads,
        attention_head_dim=spec.head_dim,
        in_channels=spec.channels,
        out_channels=spec.channels,
        text_dim=spec.text_dim,
        freq_dim=spec.time_dim,
        ffn_dim=spec.ffn_dim if isinstance(spec.ffn, MlpSpec) else None,
        num_layers=spec.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=spec.eps,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=None,
        pos_embed_seq_len=None,
    )


WanSpec.module = Wan
