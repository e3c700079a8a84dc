"""diffusers' `HunyuanVideo15Transformer3DModel` (HunyuanVideo 1.5): video and a joint context, attended jointly.

The context holds image, byT5 and text tokens, per sample the real ones first; its padding is hidden. What padded rows
themselves give is read by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...grid import Grid
from ...spec import Segment, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .host import ADDED
from .hunyuan_video import hunyuan_frame, hunyuan_site
from .processor import Processor, Stream

BYT5_TOKENS, IMAGE_TOKENS = 256, 729
"""Tokens that the released pipelines give; the image's are hidden without an image."""


class HunyuanVideo15Processor(Processor):
    """(video (B, N, C), context (B, L, C)) → the same; norms per head; a key mask (B, L) over the context."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        assert encoder_hidden_states is not None
        host, words = self.host(attn), self.host(attn, ADDED)
        mask = None if attention_mask is None else attention_mask[:, -encoder_hidden_states.shape[1] :]
        y, others = self.attend(hidden_states, host, [Stream("text", *words.rows(encoder_hidden_states), mask)])
        return y, words.out(others[0])


class HunyuanVideo15Adapter(Adapter):
    """`transformer_blocks.N.attn`."""

    model: ClassVar[str] = "HunyuanVideo15Transformer3DModel"
    streams: ClassVar[str] = "image, byT5 and text tokens: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        side = config["patch_size"]
        return Geometry((4, 16, 16), (config["patch_size_t"], side, side), causal=True)

    def site(self, config: Config) -> Site:
        return hunyuan_site(config)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return (Segment("text", text_tokens + BYT5_TOKENS + IMAGE_TOKENS),)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        return hunyuan_frame(config, arguments)

    def processor(self, group: str) -> type[nn.Module]:
        return HunyuanVideo15Processor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        side = config["patch_size"]
        return {
            "hidden_states": make(
                batch, config["in_channels"], grid.t * config["patch_size_t"], grid.h * side, grid.w * side
            ),
            "timestep": make(batch).abs() * 100,
            "encoder_hidden_states": make(batch, text_tokens, config["text_embed_dim"]),
            "encoder_attention_mask": make(batch, text_tokens).abs() >= 0,
            "encoder_hidden_states_2": make(batch, BYT5_TOKENS, config["text_embed_2_dim"]),
            "encoder_attention_mask_2": make(batch, BYT5_TOKENS).abs() >= 0,
            "image_embeds": torch.zeros_like(make(batch, IMAGE_TOKENS, config["image_embed_dim"])),
        }

    def count(self, model: Any, arguments: Mapping[str, Any]) -> None:
        # the model's forward sorts tokens by their masks' values, which a device without numbers cannot do
        x, time = arguments["hidden_states"], arguments["timestep"]
        rope, temb = model.rope(x), model.time_embed(time)
        context = torch.cat(
            [
                model.image_embedder(arguments["image_embeds"]),
                model.context_embedder_2(arguments["encoder_hidden_states_2"]),
                model.context_embedder(arguments["encoder_hidden_states"], time, arguments["encoder_attention_mask"]),
            ],
            dim=1,
        )
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=x.device)
        x = model.x_embedder(x)
        for block in model.transformer_blocks:
            x, context = block(x, context, temb, mask, rope)
        model.proj_out(model.norm_out(x, temb))
