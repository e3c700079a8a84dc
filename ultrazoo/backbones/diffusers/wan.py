"""diffusers' `WanTransformer3DModel` (Wan 2.1 and 2.2, text and image to video; arXiv 2503.20314).

Visual self-attention alone is replaced; text and image are reached through `attn2`, which stays.
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


class WanProcessor(Processor):
    """(B, N, C) → (B, N, C); norms across heads, then split, then rotation."""

    across = True

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        refuse_mask(attention_mask, "WanTransformer3DModel")
        return self.attend(hidden_states, self.host(attn))[0]


class WanAdapter(Adapter):
    """`blocks.N.attn1`. Timesteps per sample (B,) or per token (B, N)."""

    model: ClassVar[str] = "WanTransformer3DModel"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"blocks.{layer}.attn1" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        # the 5B model's VAE has 48 channels and twice the stride
        side = 16 if config["in_channels"] == 48 else 8
        return Geometry((4, side, side), tuple(config["patch_size"]), causal=True)

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        side = 2 * (head_dim // 6)
        rope = Rope(axes=(head_dim - 2 * side, side, side))
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=True, rope=rope)

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        return too_long(grid, config["rope_max_seq_len"], "rope_max_seq_len")

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        t, h, w = (
            size // patch
            for size, patch in zip(arguments["hidden_states"].shape[2:], config["patch_size"], strict=True)
        )
        return Frame((t, h, w), arguments["timestep"])

    def processor(self, group: str) -> type[nn.Module]:
        return WanProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        patch = config["patch_size"]
        size = [length * one for length, one in zip(grid, patch, strict=True)]
        return {
            "hidden_states": make(batch, config["in_channels"], *size),
            "timestep": make(batch).abs() * 100,
            "encoder_hidden_states": make(batch, text_tokens, config["text_dim"]),
        }
