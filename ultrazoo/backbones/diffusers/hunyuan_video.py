"""diffusers' `HunyuanVideoTransformer3DModel` (HunyuanVideo, arXiv 2412.03603): video and text, attended jointly.

Double-stream layers project the text by its own linears (group ``double``), single-stream ones through the video's (group
``single``); those have no output projection of their own, the block's is left to the block. Text padding is hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...grid import Grid
from ...spec import Rope, Segment, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .host import ADDED
from .processor import Processor, Stream


class HunyuanVideoProcessor(Processor):
    """(video (B, N, C), text (B, L, C)) → the same; norms per head; a key mask (B, 1, 1, N + L)."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        assert encoder_hidden_states is not None
        host = self.host(attn)
        words = host if attn.add_q_proj is None else self.host(attn, ADDED)
        # a whole text batch shares the video, which is never masked
        mask = None if attention_mask is None else attention_mask[:, 0, 0, hidden_states.shape[1] :]
        y, others = self.attend(hidden_states, host, [Stream("text", *words.rows(encoder_hidden_states), mask)])
        return y, words.out(others[0])


class HunyuanVideoAdapter(Adapter):
    """`transformer_blocks.N.attn`, then `single_transformer_blocks.N.attn`."""

    model: ClassVar[str] = "HunyuanVideoTransformer3DModel"
    streams: ClassVar[str] = "text: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {
            "double": [f"transformer_blocks.{layer}.attn" for layer in range(config["num_layers"])],
            "single": [f"single_transformer_blocks.{layer}.attn" for layer in range(config["num_single_layers"])],
        }

    def geometry(self, config: Config) -> Geometry:
        return Geometry((4, 8, 8), _patch(config), causal=True)

    def site(self, config: Config) -> Site:
        return hunyuan_site(config)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return (Segment("text", text_tokens),)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        return hunyuan_frame(config, arguments)

    def processor(self, group: str) -> type[nn.Module]:
        return HunyuanVideoProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        size = [length * one for length, one in zip(grid, _patch(config), strict=True)]
        found = {
            "hidden_states": make(batch, config["in_channels"], *size),
            "timestep": make(batch).abs() * 100,
            "encoder_hidden_states": make(batch, text_tokens, config["text_embed_dim"]),
            "encoder_attention_mask": make(batch, text_tokens).abs() >= 0,
            "pooled_projections": make(batch, config["pooled_projection_dim"]),
        }
        if config["guidance_embeds"]:
            found["guidance"] = make(batch).abs() * 1000
        return found


def _patch(config: Config) -> tuple[int, int, int]:
    return (config["patch_size_t"], config["patch_size"], config["patch_size"])


def hunyuan_site(config: Config) -> Site:
    """Dimensions and rotary embedding of both HunyuanVideo generations."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    t, h, w = config["rope_axes_dim"]
    rope = Rope(axes=(t, h, w), base=config["rope_theta"])
    return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=True, rope=rope)


def hunyuan_frame(config: Config, arguments: Mapping[str, Any]) -> Frame:
    """Grid and timestep of both HunyuanVideo generations."""
    size = arguments["hidden_states"].shape[2:]
    t, h, w = (length // one for length, one in zip(size, _patch(config), strict=True))
    return Frame((t, h, w), arguments["timestep"])
