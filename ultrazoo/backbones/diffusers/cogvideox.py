"""diffusers' `CogVideoXTransformer3DModel` (CogVideoX and 1.5, arXiv 2408.06072): text and video, attended jointly.

Both go through the same projections; only the video is rotated, by a table that the pipeline makes. The table's positions
(fractional where a size was resized to the trained one) are read back from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import Problem, UsageError
from ...grid import Grid
from ...spec import Rope, Segment, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .processor import Processor, Stream, refuse_mask
from .tables import coordinates

BASE = 10000.0


class CogVideoXProcessor(Processor):
    """(video (B, N, C), text (B, L, C)) → the same; layer norms of q and k per head."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        refuse_mask(attention_mask, "CogVideoXTransformer3DModel")
        host = self.host(attn)
        y, others = self.attend(hidden_states, host, [Stream("text", *host.rows(encoder_hidden_states))])
        return y, host.out(others[0])


class CogVideoXAdapter(Adapter):
    """`transformer_blocks.N.attn1`."""

    model: ClassVar[str] = "CogVideoXTransformer3DModel"
    streams: ClassVar[str] = "text: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn1" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        return Geometry((4, 8, 8), self._patch(config), causal=True)

    def _patch(self, config: Config) -> tuple[int, int, int]:
        return (config["patch_size_t"] or 1, config["patch_size"], config["patch_size"])

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        rope = None
        if config["use_rotary_positional_embeddings"]:
            rope = Rope(axes=(head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3), base=BASE)
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=True, rope=rope)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return (Segment("text", text_tokens),)

    def text_tokens(self, config: Config) -> int:
        return int(config["max_text_seq_length"])

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        due, added = config["max_text_seq_length"], not config["use_rotary_positional_embeddings"]
        if text_tokens == due or not (added or config["use_learned_positional_embeddings"]):
            return []
        rule = (
            f"{text_tokens} text tokens, and positions are added to text and video together for exactly {due} of text"
        )
        return [Problem("text_tokens", rule, f"write {due}, or leave it out")]

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        _, frames, _, height, width = arguments["hidden_states"].shape
        patch = self._patch(config)
        t, h, w = -(-frames // patch[0]), height // patch[1], width // patch[2]
        rope, table = self.site(config).rope, arguments["image_rotary_emb"]
        if rope is None:
            return Frame((t, h, w), arguments["timestep"])
        if table is None:
            raise UsageError("CogVideoXTransformer3DModel: this model needs image_rotary_emb, and it was not given")
        axes = []
        rows = [torch.arange(t) * h * w, torch.arange(h) * w, torch.arange(w)]
        start = 0
        for channels, row in zip(rope.axes, rows, strict=True):
            cos, sin = (one[row.to(one.device), start : start + channels] for one in table)
            axes.append(coordinates(cos, sin, BASE))
            start += channels
        return Frame((t, h, w), arguments["timestep"], coordinates=(axes[0], axes[1], axes[2]))

    def processor(self, group: str) -> type[nn.Module]:
        return CogVideoXProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        patch = self._patch(config)
        video = make(batch, grid.t * patch[0], config["in_channels"], grid.h * patch[1], grid.w * patch[2])
        table = None
        if config["use_rotary_positional_embeddings"]:
            sides = ((0, 0), (grid.h, grid.w))
            table = get_3d_rotary_pos_embed(config["attention_head_dim"], sides, (grid.h, grid.w), grid.t)
            table = tuple(one.to(video.device) for one in table)
        return {
            "hidden_states": video,
            "encoder_hidden_states": make(batch, text_tokens, config["text_embed_dim"]),
            "timestep": make(batch).abs() * 100,
            "image_rotary_emb": table,
        }
