"""diffusers' `Flux2Transformer2DModel` (FLUX.2, dev and Klein): text, target image and reference images, attended jointly.

The target is the grid: the first rows of the image, those with time 0 in ``img_ids``. Text and references (times 10, 20, …)
are extra tokens. Double-stream layers (group ``double``) have linears for the text; in single-stream layers (group
``single``) one linear makes q, k, v and the feed-forward's input, another takes both results back. The Klein pipeline that
caches references puts them first and hides the target from them: refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...grid import Grid
from ...spec import Rope, Segment, Site
from ..adapter import Adapter, Config, Frame, Part
from ..geometry import Geometry
from .host import ADDED, ModuleHost, Names
from .processor import Processor, Stream, refuse_mask, turned_pairs

MODEL = "Flux2Transformer2DModel"
PACKED = Names(q="to_qkv_mlp_proj", k="to_qkv_mlp_proj", v="to_qkv_mlp_proj")


class Flux2Processor(Processor):
    """(image (B, S, C), text (B, L, C)) → the same; q/k norms per head."""

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        refuse_mask(attention_mask, MODEL)
        host, words = self.host(attn), self.host(attn, ADDED)
        tokens, length = self.frame.tokens, encoder_hidden_states.shape[1]
        cos, sin = (table[:, None] for table in image_rotary_emb)
        streams = [Stream("text", *words.rows(encoder_hidden_states, turned_pairs(cos[:length], sin[:length])))]
        rest = hidden_states[:, tokens:]
        if rest.shape[1]:
            beyond = length + tokens
            streams.append(Stream("reference", *host.rows(rest, turned_pairs(cos[beyond:], sin[beyond:]))))
        y, others = self.attend(hidden_states[:, :tokens], host, streams)
        if rest.shape[1]:
            y = torch.cat([y, host.out(others[1])], dim=1)
        return y, words.out(others[0])


class Flux2SingleProcessor(Processor):
    """(text, target, references) in one (B, S, C) → the same, feed-forward included."""

    names = PACKED

    def run(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        refuse_mask(attention_mask, MODEL)
        frame = self.frame
        start, end = frame.start, frame.start + frame.tokens
        width = self.attention.site.width
        qkv, hidden = _packed(attn, hidden_states, width)
        hidden = attn.mlp_act_fn(hidden)  # type: ignore[operator]
        x = hidden_states[:, start:end]
        host = PackedHost(attn, frame, self.attention.site, self.names)
        host.known = (x, qkv[:, start:end].chunk(3, dim=-1), hidden[:, start:end])
        streams = []
        cos, sin = (table[:, None] for table in image_rotary_emb)
        for kind, rows in (("text", slice(0, start)), ("reference", slice(end, None))):
            q, k, v = host.heads(*qkv[:, rows].chunk(3, dim=-1), None)
            assert q is not None and k is not None and v is not None
            turn = turned_pairs(cos[rows], sin[rows])
            streams.append(Stream(kind, turn(q), turn(k), v))
        there = [stream for stream in streams if stream.q.shape[1]]
        y, others = self.attend(x, host, there)
        found = dict(zip((stream.kind for stream in there), others, strict=True))
        parts = {"target": y}
        for kind, rows in (("text", slice(0, start)), ("reference", slice(end, None))):
            if kind in found:
                parts[kind] = attn.to_out(torch.cat([found[kind], hidden[:, rows]], dim=-1))  # type: ignore[operator]
        return torch.cat([parts[kind] for kind in ("text", "target", "reference") if kind in parts], dim=1)

    def parameter(self, attn: Any, which: str, part: str) -> Part:
        if which != "o":
            # the feed-forward's rows come after those of q, k and v
            return self.third(f"{self.names.q}.{part}", which)
        return Part(f"{self.names.out}.{part}", columns=(0, self.attention.site.width))


class PackedHost(ModuleHost):
    """The host of a single-stream layer. `known`: the grid's rows, their q, k, v and their feed-forward activations.

    Other rows than those are projected by the whole packed linear again, and three quarters of its output let go: the
    linear may be quantised or carry adapters, so it is called and not cut.
    """

    known: tuple[Tensor, tuple[Tensor, ...], Tensor]

    def project(self, x: Tensor, which: str) -> Any:
        rows, parts, _ = self.known
        if x is not rows:
            parts = _packed(self.attn, x, self.site.width)[0].chunk(3, dim=-1)
        return tuple(parts) if which == "qkv" else parts["qkv".index(which)]

    def out(self, y: Tensor) -> Tensor:
        """Output projection of the grid's attention and feed-forward together, in one matmul, once."""
        hidden = self.known[2]
        if y.shape[1] != hidden.shape[1]:
            raise UsageError(
                f"{MODEL}: a single-stream layer projects its grid's rows at once, got {y.shape[1]} of them"
            )
        return self.attn.to_out(torch.cat([y, hidden], dim=-1))  # type: ignore[operator, no-any-return]


def _packed(attn: nn.Module, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, n, C) → raw q, k, v (B, n, 3*width) and the feed-forward's input, gates and values."""
    made = attn.to_qkv_mlp_proj(x)  # type: ignore[operator]
    return made[..., : 3 * width], made[..., 3 * width :]


class Flux2Adapter(Adapter):
    """`transformer_blocks.N.attn`, then `single_transformer_blocks.N.attn`."""

    model: ClassVar[str] = MODEL
    streams: ClassVar[str] = "text, reference images: rows dense, keys always"

    def paths(self, config: Config) -> dict[str, list[str]]:
        return {
            "double": [f"transformer_blocks.{layer}.attn" for layer in range(config["num_layers"])],
            "single": [f"single_transformer_blocks.{layer}.attn" for layer in range(config["num_single_layers"])],
        }

    def geometry(self, config: Config) -> Geometry:
        # pipelines fold 2 x 2 latents into a token
        return Geometry((1, 8, 8), (1, 2, 2), causal=False)

    def site(self, config: Config) -> Site:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        # the fourth axis counts text tokens and is 0 for images: its channels pass
        t, h, w = config["axes_dims_rope"][:3]
        rope = Rope(axes=(t, h, w), base=config["rope_theta"])
        return Site(dim=heads * head_dim, heads=heads, head_dim=head_dim, qk_norm=True, rope=rope)

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        return (Segment("text", text_tokens),)

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        if arguments["kv_cache_mode"] is not None or arguments["kv_cache"] is not None:
            raise UsageError(
                f"{MODEL}: kv_cache and kv_cache_mode (the Klein-KV pipeline) are not supported by this adapter; "
                "use the pipeline that keeps references in every step"
            )
        text = arguments["encoder_hidden_states"].shape[1]
        grid, coordinates = target_grid(arguments["img_ids"])
        return Frame(grid, arguments["timestep"] * 1000, start=text, coordinates=coordinates)

    def processor(self, group: str) -> type[nn.Module]:
        return Flux2SingleProcessor if group == "single" else Flux2Processor

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        image = make(batch, grid.tokens, config["in_channels"])
        found = {
            "hidden_states": image,
            "encoder_hidden_states": make(batch, text_tokens, config["joint_attention_dim"]),
            "timestep": make(batch).abs() / 4,
            "img_ids": image_ids(grid).to(image.device),
            "txt_ids": torch.nn.functional.pad(torch.arange(text_tokens)[:, None], (3, 0)).to(image.device),
        }
        if config["guidance_embeds"]:
            found["guidance"] = make(batch).abs()
        return found


def image_ids(grid: Grid, time: int = 0) -> Tensor:
    """Rows (t, h, w, l) of an image at `time`, in raster order: (H*W, 4)."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(grid.h), torch.arange(grid.w), torch.tensor([0]))


def target_grid(ids: Tensor) -> tuple[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]]:
    """Grid of the target and its coordinates per axis, from ids (S, 4) or (B, S, 4) = (t, h, w, l).

    Raises UsageError unless the rows at time 0 come first, in raster order over rows h and columns w.
    """
    rows = ids[0] if ids.ndim == 3 else ids
    place = rows.detach().to("cpu", torch.float64)
    target = (place[:, 0] == 0) & (place[:, 3] == 0)
    count = int(target.sum())
    place = place[:count]
    width = int((place[:, 1] == place[0, 1]).sum()) if count else 1
    h, w = place[::width, 1], place[:width, 2]
    in_order = torch.cartesian_prod(h, w) if count % width == 0 else place[:, :0]
    if not count or not bool(target[:count].all()) or not torch.equal(in_order, place[:, 1:3]):
        raise UsageError(
            f"{MODEL}: img_ids must begin with the target's rows (time 0), one image row after another; references "
            "(times 10, 20, …) follow"
        )
    axes = (place[:1, 0], h, w)
    return (1, len(h), len(w)), tuple(axis.to(rows.device) for axis in axes)  # type: ignore[return-value]
