"""diffusers' `PixArtTransformer2DModel` (PixArt-alpha and -Sigma, arXiv 2403.04692): image self-attention alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import Problem
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

    def problems(self, config: Config) -> list[Problem]:
        found = []
        dim, cross = self.site(config).dim, config["cross_attention_dim"]
        if config["caption_channels"] is not None and cross not in (None, dim):
            rule = f"captions are projected to {dim} channels, the cross-attention reads {cross}"
            found.append(Problem("cross_attention_dim", rule, f"write {dim}, or caption_channels: null"))
        if _conditioned(config) and dim % 3:
            rule = f"resolution and aspect ratio are embedded in thirds of {dim} channels, which 3 does not divide"
            fix = "write false, or other num_attention_heads and attention_head_dim; it is true at sample_size 128 if not given"
            found.append(Problem("use_additional_conditions", rule, fix))
        return found

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        patch = config["patch_size"]
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if _conditioned(config):
            # height and width in pixels, and their quotient
            added = {"resolution": make(batch, 2).abs() * 1000, "aspect_ratio": make(batch, 1).abs()}
        # without a projection of captions the text goes to the cross-attention as it is
        channels = config["caption_channels"] or config["cross_attention_dim"]
        return {
            "hidden_states": make(batch, config["in_channels"], grid.h * patch, grid.w * patch),
            "encoder_hidden_states": None if channels is None else make(batch, text_tokens, channels),
            "timestep": make(batch).abs() * 100,
            "added_cond_kwargs": added,
        }


def _conditioned(config: Config) -> bool:
    """Whether the model takes resolution and aspect ratio, as it decides that itself."""
    given = config["use_additional_conditions"]
    return bool(config["sample_size"] == 128 if given is None else given)
