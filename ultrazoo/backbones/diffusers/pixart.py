"""diffusers' `PixArtTransformer2DModel` (PixArt-alpha and -Sigma, arXiv 2403.04692): image self-attention alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...grid import Grid
from ...spec import Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .processor import Processor


class PixArtProcessor(Processor):
    """(B, N, C) → (B, N, C); no norms, no rotation. A mask over the image, additive (B, 1, N), hides keys."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        # the model turned the caller's mask of ones and zeros into 0 and -10000
        valid = None if attention_mask is None else attention_mask[:, 0] > -1
        return self.attend(hidden_states, self.host(attn), key_valid=valid)[0]


class PixArtAdapter(Adapter):
    """`transformer_blocks.N.attn1`; absolute positions, added before the first block."""

    model: ClassVar[str] = "PixArtTransformer2DModel"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn1" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        return Geometry((1, 8, 8), (1, config["patch_size"], config["patch_size"]), causal=False)

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        h, w = (size // config["patch_size"] for size in arguments["hidden_states"].shape[2:])
        return Frame((1, h, w), arguments["timestep"])

    def processor(self, group: str) -> type[nn.Module]:
        return PixArtProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        patch = config["patch_size"]
        return {
            "hidden_states": make(batch, config["in_channels"], grid.h * patch, grid.w * patch),
            "encoder_hidden_states": make(batch, text_tokens, config["caption_channels"]),
            "timestep": make(batch).abs() * 100,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
