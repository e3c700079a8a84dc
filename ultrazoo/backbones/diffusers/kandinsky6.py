"""diffusers' `Kandinsky6Transformer3DModel` (Kandinsky 6): video self-attention inside blocks fused with audio.

Audio and text keep their own attentions. A reference frame that the pipeline appends (time position 0 again) is no frame of
the grid: its rows are extra tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import Problem
from ...grid import Grid
from ...spec import Rope, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .host import Names
from .processor import Processor, Stream, refuse_mask, turned_pairs
from .tables import too_long

NAMES = Names("to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer", fused="to_qkv")

PLACES, WORDS = 128, 2048
"""Positions in the model's rotary tables: of an axis of the video, and of the text. No setting changes them."""


class Kandinsky6Processor(Processor):
    """(B, N, C) → (B, N, C); norms per head."""

    names = NAMES

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        rotary_emb_kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        refuse_mask(attn_mask, "Kandinsky6Transformer3DModel")
        host, tokens = self.host(attn), self.frame.tokens
        rest = hidden_states[:, tokens:]
        if not rest.shape[1]:
            return self.attend(hidden_states, host)[0]
        assert rotary_emb is not None
        # (n, 1, D/2, 2, 2) matrices [[cos, -sin], [sin, cos]] → each value twice
        cos, sin = (rotary_emb[tokens:, ..., row, 0].repeat_interleave(2, dim=-1) for row in (0, 1))
        streams = [Stream("reference", *host.rows(rest, turned_pairs(cos, sin)))]
        y, others = self.attend(hidden_states[:, :tokens], host, streams)
        return torch.cat([y, host.out(others[0])], dim=1)


class Kandinsky6Adapter(Adapter):
    """`visual_transformer_blocks.N.video_dec_block.self_attention`."""

    model: ClassVar[str] = "Kandinsky6Transformer3DModel"
    streams: ClassVar[str] = "a reference frame: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        layers = range(config["num_visual_blocks"])
        return {"": [f"visual_transformer_blocks.{layer}.video_dec_block.self_attention" for layer in layers]}

    def block(self, path: str) -> str:
        return path.removesuffix(".video_dec_block.self_attention")

    def geometry(self, config: Config) -> Geometry:
        return Geometry((4, 8, 8), tuple(config["patch_size"]), causal=True)

    def site(self, config: Config) -> Site:
        t, h, w = config["axes_dims"]
        dim = config["model_dim"]
        rope = Rope(axes=(t, h, w))
        return Site(dim=dim, heads=dim // (t + h + w), head_dim=t + h + w, qk_norm=True, rope=rope)

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        found = too_long(grid, PLACES)
        if text_tokens > WORDS:
            rule = f"{text_tokens} text tokens, the model's table holds {WORDS} positions of text"
            found.append(Problem("text_tokens", rule, f"write {WORDS} or less"))
        return found

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        size = arguments["hidden_states"].shape[1:4]
        t, h, w = (length // patch for length, patch in zip(size, config["patch_size"], strict=True))
        given = arguments["visual_rope_pos"]
        device = arguments["hidden_states"].device
        axes = given if given is not None else tuple(torch.arange(n, device=device) for n in (t, h, w))
        if given is not None and t > 1 and int(given[0][-1]) == 0:
            t -= 1
        scaled = [axis.double() / scale for axis, scale in zip(axes, config["scale_factor"], strict=True)]
        return Frame((t, h, w), arguments["timestep"], coordinates=(scaled[0][:t], scaled[1], scaled[2]))

    def processor(self, group: str) -> type[nn.Module]:
        return Kandinsky6Processor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        size = [length * patch for length, patch in zip(grid, config["patch_size"], strict=True)]
        channels = config["in_visual_dim"] * (2 if config["visual_cond"] else 1) + bool(config["visual_cond"])
        return {
            "hidden_states": make(batch, *size, channels),
            "encoder_hidden_states": make(batch, text_tokens, config["in_text_dim"]),
            "pooled_projections": make(batch, config["in_text_dim2"]),
            "timestep": make(batch).abs() * 100,
        }
