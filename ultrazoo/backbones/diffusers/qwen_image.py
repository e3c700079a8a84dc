"""diffusers' `QwenImageTransformer2DModel` (Qwen-Image, arXiv 2508.02324): an image stream and a text stream, attended jointly.

The target image is the grid. Text rows, and the rows of further images in edit models, are extra tokens: seen by all,
seeing all. Positions of the image are centred, those of the text begin beyond it, all as the model hands them over.
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
from .host import ADDED
from .processor import Processor, Stream, refuse_mask, turned_complex
from .tables import too_long

PLACES = 4096
"""Positions in the model's rotary tables. No setting changes them."""


class QwenImageProcessor(Processor):
    """(image (B, S, C), text (B, L, C)) → the same; q/k norms per head."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        refuse_mask(attention_mask, "QwenImageTransformer2DModel")
        assert encoder_hidden_states is not None
        host, words = self.host(attn), self.host(attn, ADDED)
        tokens = self.frame.tokens
        image, text = image_rotary_emb
        rest = hidden_states[:, tokens:]
        streams = [
            Stream(
                "text", *words.rows(encoder_hidden_states, turned_complex(text[:, None])), encoder_hidden_states_mask
            )
        ]
        if rest.shape[1]:
            streams.append(Stream("reference", *host.rows(rest, turned_complex(image[tokens:, None]))))
        y, others = self.attend(hidden_states[:, :tokens], host, streams)
        if rest.shape[1]:
            y = torch.cat([y, host.out(others[1])], dim=1)
        return y, words.out(others[0])


class QwenImageAdapter(Adapter):
    """`transformer_blocks.N.attn`; grids come with ``img_shapes``, the target first."""

    model: ClassVar[str] = "QwenImageTransformer2DModel"
    streams: ClassVar[str] = "text, further images: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"transformer_blocks.{layer}.attn" for layer in range(config["num_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        return Geometry((4, 8, 8), (1, config["patch_size"], config["patch_size"]), causal=True)

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        t, h, w = config["axes_dims_rope"]
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=True, rope=Rope(axes=(t, h, w)))

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return (Segment("text", text_tokens),)

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        # positions of the image are centred, those of the text begin where they end
        most = PLACES - max(grid.h // 2, grid.w // 2)
        if text_tokens <= most:
            return too_long(grid, PLACES)
        rule = f"{text_tokens} text tokens, the model's table holds {most} positions of text beside a grid of {grid}"
        return [Problem("text_tokens", rule, f"write {most} or less" if most > 0 else "give a smaller image")]

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        x, shapes = arguments["hidden_states"], arguments["img_shapes"]
        if not shapes:
            raise UsageError("QwenImageTransformer2DModel: img_shapes says the grid of every image; it was not given")
        rows = shapes if isinstance(shapes[0], list) else [shapes]
        targets = {tuple(row[0] if isinstance(row, list) else row) for row in rows}
        if len(targets) > 1:
            raise UsageError(
                f"QwenImageTransformer2DModel: one batch holds grids {sorted(targets)}; give one grid a call"
            )
        t, h, w = targets.pop()
        # centred: as many columns left of 0 as right of it, one more left where they are odd
        index = [torch.arange(n, device=x.device, dtype=torch.float64) for n in (t, h, w)]
        index[1], index[2] = index[1] - (h - h // 2), index[2] - (w - w // 2)
        return Frame((t, h, w), arguments["timestep"] * 1000, coordinates=(index[0], index[1], index[2]))

    def processor(self, group: str) -> type[nn.Module]:
        return QwenImageProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        mask = make(batch, text_tokens) > -1
        mask[:, 0] = True
        return {
            "hidden_states": make(batch, grid.tokens, config["in_channels"]),
            "encoder_hidden_states": make(batch, text_tokens, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": mask,
            "timestep": make(batch).abs() / 4,
            "img_shapes": [[tuple(grid)]] * batch,
        }
