"""timm's vision transformers: attention at ``blocks.N.attn`` over an image's patches, with tokens of its own in front.

Rows are [class, registers, patches]; what stands in front of the patches is extra tokens. Three rotary embeddings turn the
patches' queries and keys by a speed per axis and pair: `RotaryEmbeddingCat` (EVA-02; arXiv 2303.11331) and
`RotaryEmbeddingDinoV3` (arXiv 2508.10104) give one half of the pairs to each axis, `RotaryEmbeddingMixed` (arXiv 2403.13298)
turns every pair by both, with speeds learned per layer and head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...attention.contract import Positions
from ...errors import UsageError
from ...grid import Grid
from ...spec import Rope, Segment, Site
from ..adapter import Adapter, Config, Frame, Part
from ..diffusers.host import Names
from ..diffusers.physical import TableHost
from ..diffusers.processor import Processor, Stream
from ..geometry import Geometry

NAMES = Names("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "proj", "qkv")


class VitHost(TableHost):
    """A timm attention module as the host. `x`: the rows it was called with, which a gate looks at."""

    def __init__(self, attn: nn.Module, frame: Frame, site: Site, x: Tensor):
        super().__init__(attn, frame, site, NAMES)
        self.x = x

    def project(self, x: Tensor, which: str) -> Any:
        attn: Any = self.attn
        if attn.qkv is None:
            return super().project(x, which)
        raw = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            raw = raw + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        parts = raw.chunk(3, dim=-1)
        return parts if which == "qkv" else parts["qkv".index(which)]

    def table(self, at: Positions, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        rows, columns = (one.to(like.device) for one in speeds(self.frame.own, self.site.layer))
        down, across = (one.to(like.device, wide)[:, None, None] for one in (at.h, at.w))
        # (T, H, W, heads or 1, D/2): time has no part
        angles = (down[:, None] * rows.to(wide) + across[None] * columns.to(wide)).expand(len(at.t), -1, -1, -1, -1)
        angles = angles.flatten(0, 2)
        return angles.cos(), angles.sin()

    def out(self, y: Tensor) -> Tensor:
        return self.out_of(y, self.x)

    def out_of(self, y: Tensor, x: Tensor) -> Tensor:
        """Inner norm, gate by the rows x that y belongs to, output projection: (B, n, width) → (B, n, C)."""
        attn: Any = self.attn
        y = attn.norm(y)
        if getattr(attn, "gate", None) is not None:
            if y.shape[1] != x.shape[1]:
                raise UsageError(f"a gated attention takes its rows at once, {x.shape[1]} of them, got {y.shape[1]}")
            y = y * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(y))  # type: ignore[no-any-return]


def speeds(rope: Any, layer: int) -> tuple[Tensor, Tensor]:
    """What a unit of height and one of width turn each pair by: (heads, D/2) or (1, D/2) each, in radians."""
    swapped = rope.grid_indexing == "xy"
    if hasattr(rope, "freqs"):
        # (2, layers, heads, D/2), learned
        first, second = rope.freqs[0, layer], rope.freqs[1, layer]
    else:
        one = rope.bands if hasattr(rope, "bands") else 2 * math.pi / rope.periods
        none = torch.zeros_like(one)
        first, second = torch.cat([one, none])[None], torch.cat([none, one])[None]
    return (second, first) if swapped else (first, second)


def coordinates(rope: Any, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `rope` calls row and column 0, 1, … of a grid."""
    sizes = grid[1:]
    # mixed speeds are per patch, whatever the image's size
    offset, reference = getattr(rope, "grid_offset", 0.0), getattr(rope, "ref_feat_shape", None)
    axes = []
    for axis, size in enumerate(sizes):
        # two places even of an axis of one, so that what lies between tokens is known to be close
        index = torch.arange(max(size, 2), dtype=torch.float64, device=device)
        if hasattr(rope, "periods"):
            norm = {"separate": size, "max": max(sizes), "min": min(sizes)}[rope.normalize_coords]
            axes.append((index + 0.5 + offset) / norm * 2 - 1)
        else:
            axes.append((index + offset) * (reference[axis] / size if reference is not None else 1))
    return torch.zeros(1, dtype=torch.float64, device=device), axes[0], axes[1]


class VitProcessor(Processor):
    """(B, prefix + N, C) → the same; a mask of keys (B or 1, 1, 1, prefix + N), True is seen."""

    names = NAMES

    def run(self, attn: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        model = self.installed.adapter.model
        if is_causal:
            raise UsageError(f"{model}: is_causal is not supported by this adapter")
        dropout: Any = attn.attn_drop
        if attn.training and dropout.p:
            raise UsageError(
                f"{model}: dropout of attention weights ({dropout.p}) is not supported; set attn_drop.p to 0"
            )
        frame, site = self.frame, self.attention.site
        front = sum(segment.length for segment in site.extra)
        seen = _keys(attn_mask, x, model)
        host = VitHost(attn, frame, site, x[:, front:])
        streams = []
        for segment, start in zip(site.extra, _starts(site.extra), strict=True):
            rows = slice(start, start + segment.length)
            streams.append(Stream(segment.kind, *host.rows(x[:, rows]), None if seen is None else seen[:, rows]))
        y, others = self.attend(x[:, front:], host, streams, None if seen is None else seen[:, front:])
        if not others:
            return y
        return torch.cat([host.out_of(torch.cat(others, dim=1), x[:, :front]), y], dim=1)

    def parameter(self, attn: Any, which: str, part: str) -> Part:
        if attn.qkv is None or which == "o":
            return super().parameter(attn, which, part)
        if part == "bias" and getattr(attn, "q_bias", None) is not None:
            return Part(f"{which}_bias")
        return self.third(f"qkv.{part}", which)


class EvaProcessor(VitProcessor):
    """The same; the stock module is handed the rotary table as well."""

    def run(  # type: ignore[override]
        self,
        attn: nn.Module,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return super().run(attn, x, attn_mask, is_causal)


def _starts(segments: Sequence[Segment]) -> list[int]:
    return [sum(one.length for one in segments[:index]) for index in range(len(segments))]


def _keys(mask: Tensor | None, x: Tensor, model: str) -> Tensor | None:
    """Which of the rows x (B, S, C) are keys, (B, S), from a mask of timm's. Raises UsageError for one by queries."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, x.shape[1]):
        raise UsageError(
            f"{model}: attn_mask is a bool mask of keys (batch or 1, 1, 1, {x.shape[1]}) for this adapter, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    return mask[:, 0, 0].expand(x.shape[0], -1)


class VitAdapter(Adapter):
    """``blocks.N.attn`` of one of timm's models; its config is what `facts.read` found in it."""

    streams: ClassVar[str] = "class token, registers: rows dense, keys always"

    def __init__(self, model: str):
        self.model = model  # type: ignore[misc]

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {"": [f"blocks.{layer}.attn" for layer in range(config["depth"])]}

    def geometry(self, config: Config) -> Geometry:
        return Geometry((1, 1, 1), (1, *config["patch"]), causal=False)

    def site(self, config: Config) -> Site:
        half, rest = config["head_dim"] // 4 * 2, config["head_dim"] // 2 - config["head_dim"] // 4
        rope = None
        if config["rope"]:
            # the speeds are the model's own: that there is a rotary embedding, on which base and pairs
            rope = Rope((0, half, 2 * rest), base=config["base"], pairing=config["pairing"])
        return Site(
            dim=config["dim"],
            heads=config["heads"],
            head_dim=config["head_dim"],
            qk_norm=config["qk_norm"],
            rope=rope,
            has_timestep=False,
        )

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return tuple(Segment(kind, length) for kind, length in config["front"] if length)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        """Of a model whose patches have been embedded: `grid` (H, W), the model's `rope` module, `device`."""
        h, w = arguments["grid"]
        rope, grid = arguments["rope"], (1, h, w)
        if rope is None:
            return Frame(grid)
        if rope.training and getattr(rope, "aug_active", False):
            raise UsageError(
                f"{self.model}: while it trains, its rotary coordinates are moved at random, which attentions of a recipe cannot "
                "follow; set model.rope.aug_active = False"
            )
        return Frame(grid, coordinates=coordinates(rope, grid, arguments["device"]), own=rope)

    def processor(self, group: str) -> type[nn.Module]:
        return VitProcessor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        high, wide = config["patch"]
        return {"x": make(batch, config["channels"], grid.h * high, grid.w * wide)}


class EvaAdapter(VitAdapter):
    """Of the class `Eva`, whose attentions are handed a rotary table."""

    def processor(self, group: str) -> type[nn.Module]:
        return EvaProcessor
