"""diffusers' `ZImageTransformer2DModel` (Z-Image, arXiv 2511.22699): image and text in one packed sequence.

A sample's rows are [image, pads, text, pads, fill]: the image and the text are each padded to a multiple of 32 by learned
tokens, which attend and are attended to, and the shorter samples of a batch are filled up with rows that no one sees. The
image's time is one more than the padded length of the text, so it differs between samples; our positions are those of the
longest, and the rows beside the image are turned back by the difference: scores depend on differences of positions alone.
The refiners keep their own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import Problem, UsageError
from ...grid import Grid
from ...ops.rope import frequencies
from ...spec import Rope, Segment, Site
from ..adapter import TEXT_TOKENS, Adapter, Config, Frame
from ..geometry import Geometry
from .processor import Processor, Stream, turned_complex

MODEL = "ZImageTransformer2DModel"
MULTIPLE = 32
"""What the model pads an image and a text to."""


class ZImageProcessor(Processor):
    """(B, S, C) → (B, S, C); norms per head; a key mask (B, S) where the samples' lengths differ."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        assert freqs_cis is not None
        frame, host = self.frame, self.host(attn)
        tokens = frame.tokens
        length = tokens + -tokens % MULTIPLE
        table = self._shifted(freqs_cis[:, tokens:])[:, :, None]  # (B, n, 1, D/2)
        streams = []
        for kind, first, last in (("pad", tokens, length), ("text", length, hidden_states.shape[1])):
            if last > first:
                rows = host.rows(hidden_states[:, first:last], turned_complex(table[:, first - tokens : last - tokens]))
                mask = None if attention_mask is None else attention_mask[:, first:last]
                streams.append(Stream(kind, *rows, mask))
        y, others = self.attend(hidden_states[:, :tokens], host, streams)
        return torch.cat([y, *(host.out(other) for other in others)], dim=1)

    def _shifted(self, table: Tensor) -> Tensor:
        """(B, n, D/2), each sample's times moved on by what its text is shorter than the longest."""
        shifts, rope = self.frame.own, self.attention.site.rope
        if shifts is None:
            return table
        assert rope is not None
        speed = frequencies(rope.axes[0], rope.base, table.device)
        angles = torch.tensor(shifts, dtype=torch.float64, device=table.device)[:, None, None] * speed
        turn = torch.nn.functional.pad(angles, (0, table.shape[-1] - angles.shape[-1]))
        return table * torch.polar(torch.ones_like(turn), turn).to(table.dtype)


class ZImageAdapter(Adapter):
    """`layers.N.attention`; images, texts and timesteps of a batch come as lists."""

    model: ClassVar[str] = MODEL
    streams: ClassVar[str] = "pads of the image, text: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"layers.{layer}.attention" for layer in range(config["n_layers"])]}

    def geometry(self, config: Config) -> Geometry:
        side = config["all_patch_size"][0]
        return Geometry((1, 8, 8), (config["all_f_patch_size"][0], side, side), causal=False)

    def site(self, config: Config) -> Site:
        heads, dim = config["n_heads"], config["dim"]
        t, h, w = config["axes_dims"]
        rope = Rope(axes=(t, h, w), base=config["rope_theta"])
        return Site(dim=dim, heads=heads, head_dim=dim // heads, qk_norm=config["qk_norm"], rope=rope)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return (Segment("text", text_tokens + -text_tokens % MULTIPLE),)

    def text_tokens(self, config: Config) -> int:
        # what the tables hold beside one image, where that is less
        return max(1, min(TEXT_TOKENS, (config["axes_lens"][0] - 2) // MULTIPLE * MULTIPLE))

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        # a text's positions begin at 1, an image's behind those of the padded text
        due = [text_tokens + -text_tokens % MULTIPLE + 1 + grid.t, grid.h, grid.w]
        held = list(config["axes_lens"])
        if all(one <= other for one, other in zip(due, held, strict=True)):
            return []
        rule = f"the rotary tables hold {held} positions, grid {grid} behind {text_tokens} text tokens needs {due}"
        return [Problem("config.axes_lens", rule, "give a smaller video, fewer text_tokens or longer tables")]

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        images = arguments["x"]
        if isinstance(images[0], list):
            raise UsageError(f"{MODEL}: several images a sample (the omni mode) are not supported by this adapter")
        sizes = sorted({tuple(image.shape[1:]) for image in images})
        if len(sizes) > 1:
            raise UsageError(f"{MODEL}: one batch holds images of sizes {sizes}; give one size a call")
        patch = (arguments["f_patch_size"], arguments["patch_size"], arguments["patch_size"])
        t, h, w = (size // one for size, one in zip(sizes[0], patch, strict=True))
        lengths = [len(text) + -len(text) % MULTIPLE for text in arguments["cap_feats"]]
        shifts = [max(lengths) - length for length in lengths]
        index = [torch.arange(n, device=images[0].device, dtype=torch.float64) for n in (t, h, w)]
        index[0] = index[0] + (max(lengths) + 1)
        # its time runs the other way: 1 is clean
        time = (1 - arguments["t"]) * 1000
        return Frame((t, h, w), time, coordinates=(index[0], index[1], index[2]), own=shifts if any(shifts) else None)

    def processor(self, group: str) -> type[nn.Module]:
        return ZImageProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        side, frames = config["all_patch_size"][0], config["all_f_patch_size"][0]
        size = (config["in_channels"], grid.t * frames, grid.h * side, grid.w * side)
        return {
            "x": [make(*size) for _ in range(batch)],
            "t": make(batch).abs() / 4,
            "cap_feats": [make(text_tokens, config["cap_feat_dim"]) for _ in range(batch)],
        }
