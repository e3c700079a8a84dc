"""diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, arXiv 2403.03206): image and text, attended jointly.

Blocks named in ``dual_attention_layers`` have a second attention over the image alone; those are layers of the group
``image``, the joint ones of the group ``joint``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...attention.full import dense_cost
from ...errors import Problem
from ...grid import Grid
from ...spec import Segment, Site
from ..adapter import Adapter, Config, Frame
from ..geometry import Geometry
from .host import ADDED
from .processor import Processor, Stream, refuse_mask


class SD3Processor(Processor):
    """(image (B, N, C), text (B, L, C) or None) → the same; optional q/k norms per head, no rotation."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        refuse_mask(attention_mask, "SD3Transformer2DModel")
        host = self.host(attn)
        if encoder_hidden_states is None:
            return self.attend(hidden_states, host)[0]
        words = self.host(attn, ADDED)
        y, others = self.attend(hidden_states, host, [Stream("text", *words.rows(encoder_hidden_states))])
        # the last block has no projection for the text, which nobody reads any more
        return y, words.out(others[0])


class SD3Adapter(Adapter):
    """`transformer_blocks.N.attn` (joint) and `.attn2` (image)."""

    model: ClassVar[str] = "SD3Transformer2DModel"
    streams: ClassVar[str] = "text: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        joint = [f"transformer_blocks.{layer}.attn" for layer in range(config["num_layers"])]
        image = [f"transformer_blocks.{layer}.attn2" for layer in config["dual_attention_layers"] or ()]
        return {"joint": joint, "image": image} if image else {"": joint}

    def geometry(self, config: Config) -> Geometry:
        return Geometry((1, 8, 8), (1, config["patch_size"], config["patch_size"]), causal=False)

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=config["qk_norm"] is not None)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return () if group == "image" else (Segment("text", text_tokens),)

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        most = config["pos_embed_max_size"]
        if most is None or max(grid.h, grid.w) <= most:
            return []
        rule = f"the model holds positions of {most} x {most} tokens, the grid is {grid}"
        return [Problem("config.pos_embed_max_size", rule, f"give a smaller video, or write {max(grid.h, grid.w)}")]

    def layer_flops(self, config: Config, path: str, site: Site, flops: Callable[[str], int]) -> int:
        if path.endswith(".attn2"):
            # counted with the joint attention of its block
            return 0
        layer = int(path.split(".")[1])
        image = dense_cost(site.at(extra=())).flops if layer in (config["dual_attention_layers"] or ()) else 0
        return super().layer_flops(config, path, site, flops) - image

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        h, w = (size // config["patch_size"] for size in arguments["hidden_states"].shape[2:])
        return Frame((1, h, w), arguments["timestep"])

    def processor(self, group: str) -> type[nn.Module]:
        return SD3Processor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        patch = config["patch_size"]
        return {
            "hidden_states": make(batch, config["in_channels"], grid.h * patch, grid.w * patch),
            "encoder_hidden_states": make(batch, text_tokens, config["joint_attention_dim"]),
            "pooled_projections": make(batch, config["pooled_projection_dim"]),
            "timestep": make(batch).abs() * 100,
        }
