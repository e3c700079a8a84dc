"""diffusers' `SanaVideoTransformer3DModel` (SANA-Video, arXiv 2509.24695): linear self-attention over the video.

Its own attention is `linear` (relu features, the rotary embedding after them in the numerator), not softmax attention:
`full` is another model, `{name: linear, eps: 1e-15}` the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import Problem
from ...grid import Grid
from ...spec import Rope, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .processor import Processor, refuse_mask
from .tables import too_long


class SanaVideoProcessor(Processor):
    """(B, N, C) → (B, N, C); norms across heads."""

    across = True

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        refuse_mask(attention_mask, "SanaVideoTransformer3DModel")
        return self.attend(hidden_states, self.host(attn))[0]


class SanaVideoAdapter(Adapter):
    """`transformer_blocks.N.attn1`. Timesteps per sample, or one per token after flattening."""

    model: ClassVar[str] = "SanaVideoTransformer3DModel"
    softmax: ClassVar[bool] = False

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn1" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        # 16 channels: Wan's VAE; 128: LTX-2's; others: DC-AE-V's
        strides = {16: (4, 8, 8), 128: (8, 32, 32)}.get(config["in_channels"], (4, 32, 32))
        return Geometry(strides, tuple(config["patch_size"]), causal=True)

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        side = 2 * (head_dim // 6)
        rope = Rope(axes=(head_dim - 2 * side, side, side))
        norm = config["qk_norm"] is not None
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=norm, rope=rope)

    def layer_flops(self, config: Config, path: str, site: Site, flops: Callable[[str], int]) -> int:
        return flops(self.block(path)) - flops(path)

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        return too_long(grid, config["rope_max_seq_len"], "rope_max_seq_len")

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        x, timestep = arguments["hidden_states"], arguments["timestep"]
        t, h, w = (size // patch for size, patch in zip(x.shape[2:], config["patch_size"], strict=True))
        if timestep.numel() == x.shape[0] * t * h * w:
            timestep = timestep.reshape(x.shape[0], -1)
        return Frame((t, h, w), timestep)

    def processor(self, group: str) -> type[nn.Module]:
        return SanaVideoProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        size = [length * one for length, one in zip(grid, config["patch_size"], strict=True)]
        return {
            "hidden_states": make(batch, config["in_channels"], *size),
            "encoder_hidden_states": make(batch, text_tokens, config["caption_channels"]),
            "timestep": make(batch).abs() * 100,
        }
