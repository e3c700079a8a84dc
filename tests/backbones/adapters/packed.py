"""Tiny models whose sequences are packed rows (LTX, LTX-2, MiniMax-H3), and the ways to call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrazoo.backbones.diffusers.minimax_h3 import clip, layout
from ultrazoo.grid import Grid


def as_it_is(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return arguments


def places(*axes: Tensor) -> Tensor:
    """(t, h, w) of every row of a grid: (n, 3)."""
    return torch.cartesian_prod(*axes).reshape(-1, 3)


def ltx_places(grid: Grid, first: float = 0.0, frames: int | None = None) -> Tensor:
    """Seconds and pixels of a clip's rows, (n, 3); its first frame at `first` seconds, a sixth of a second before others."""
    length = grid.t if frames is None else frames
    t = (torch.arange(length) * 8.0 - 7).clamp(min=0) / 25 + first
    return places(t, torch.arange(grid.h) * 32.0, torch.arange(grid.w) * 32.0)


def by_coordinates(arguments: dict[str, Any], grid: Grid, rows: Tensor) -> dict[str, Any]:
    """The call with more rows, and video_coords in place of sizes."""
    x = arguments["hidden_states"]
    kept = {
        k: v for k, v in arguments.items() if k not in ("num_frames", "height", "width", "rope_interpolation_scale")
    }
    more = torch.randn(2, rows.shape[0] - x.shape[1], x.shape[2])
    return {**kept, "hidden_states": torch.cat([x, more], dim=1), "video_coords": rows.T.expand(2, 3, -1)}


def given_places(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return by_coordinates(arguments, grid, ltx_places(grid))


def conditions_first(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Two images at later times before the clip, and a noise level for every row."""
    rows = torch.cat([ltx_places(grid, 3.2, 1), ltx_places(grid, 1.6, 1), ltx_places(grid)])
    levels = torch.full((2, rows.shape[0]), 700.0)
    levels[:, : 2 * grid.h * grid.w] = 50.0
    return {**by_coordinates(arguments, grid, rows), "timestep": levels}


def overlap_last(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """A window of a long video: one more frame after the clip, at a time before it; sizes that say nothing."""
    found = by_coordinates(arguments, grid, torch.cat([ltx_places(grid), ltx_places(grid, -0.04, 1)]))
    return {**found, "num_frames": 1, "height": 1, "width": 1, "timestep": found["timestep"][:, None, None]}


def levels_per_row(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**arguments, "timestep": torch.linspace(0, 900, grid.tokens).expand(2, -1).contiguous()}


def one_level_column(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**arguments, "timestep": arguments["timestep"][:, None]}


def masked_prompt(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    mask = torch.ones_like(arguments["encoder_attention_mask"])
    mask[1, 3:] = 0
    return {**arguments, "encoder_attention_mask": mask}


ROWS: dict[str, dict[str, Any]] = {
    "LTXVideoTransformer3DModel": {
        "settings": {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 12,
        },
        "variants": {
            "plain": as_it_is,
            "masked": masked_prompt,
            "per token": levels_per_row,
            "a column": one_level_column,
            "coordinates": given_places,
            "conditions first": conditions_first,
            "overlap last": overlap_last,
        },
    },
}


def ltx2_bounds(grid: Grid, first: float = 0.0, frames: int | None = None) -> Tensor:
    """Bounds of a clip's patches in seconds and pixels, (n, 3, 2); its first frame at `first` seconds."""
    length = grid.t if frames is None else frames
    edges = [((torch.arange(length) + i) * 8.0 - 7).clamp(min=0) / 24 + first for i in (0, 1)]
    sides = [[(torch.arange(n) + i) * 32.0 for n in (grid.h, grid.w)] for i in (0, 1)]
    return torch.stack([places(edges[i], *sides[i]) for i in (0, 1)], dim=-1)


def with_bounds(arguments: dict[str, Any], grid: Grid, bounds: Tensor) -> dict[str, Any]:
    x = arguments["hidden_states"]
    more = torch.randn(2, bounds.shape[0] - x.shape[1], x.shape[2])
    coords = bounds.transpose(0, 1).expand(2, -1, -1, -1)
    return {**arguments, "hidden_states": torch.cat([x, more], dim=1), "video_coords": coords}


def keyframe_last(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """A keyframe that lasts one picture, after the clip in the sequence and in time; a noise level for every row."""
    last = (8 * (grid.t - 1)) / 24
    found = with_bounds(arguments, grid, torch.cat([ltx2_bounds(grid), ltx2_bounds(grid, last, 1)]))
    levels = torch.full(found["hidden_states"].shape[:2], 700.0)
    levels[:, grid.tokens :] = 50.0
    return {**found, "timestep": levels, "audio_timestep": torch.full((2,), 300.0)}


def sizes_unsaid(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**keyframe_last(arguments, grid), "num_frames": None, "height": None, "width": None}


def hidden_rows(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Some tokens of the clip and some of the keyframe are seen by nobody."""
    found = keyframe_last(arguments, grid)
    rows = found["hidden_states"].shape[1]
    mask = torch.ones(2, rows, rows)
    mask[1, :, 3:9] = 0
    mask[1, :, -4:] = 0
    return {**found, "video_self_attention_mask": mask}


def perturbed(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**keyframe_last(arguments, grid), "spatio_temporal_guidance_blocks": [1]}


def perturbed_in_part(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**perturbed(arguments, grid), "perturbation_mask": torch.tensor([0.0, 1.0])}


def apart(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    return {**arguments, "isolate_modalities": True}


ROWS["LTX2VideoTransformer3DModel"] = {
    # as LTX-2.3
    "settings": {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 6,
        "audio_out_channels": 6,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "caption_channels": 12,
        "num_layers": 2,
        "rope_type": "split",
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "perturbed_attn": True,
    },
    "variants": {
        "plain": as_it_is,
        "masked": masked_prompt,
        "keyframe": keyframe_last,
        "sizes unsaid": sizes_unsaid,
        "hidden rows": hidden_rows,
        "perturbed": perturbed,
        "perturbed in part": perturbed_in_part,
        "apart": apart,
    },
}


def h3_rows(arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The plain layout again, segment by segment."""
    places = arguments["position_ids"]
    return [(kind, places[arguments[f"{kind}_indices"]]) for kind in ("text", "audio", "video")]


def h3_laid_out(arguments: dict[str, Any], *segments: tuple[str, Tensor], levels: Any = None) -> dict[str, Any]:
    """A call with these segments; rows that it has more of are random. `levels`: how clean each segment is."""
    packed = layout(*segments)
    levels = [0.3] * len(segments) if levels is None else levels
    of_row = torch.cat([torch.full((len(rows),), level) for (_, rows), level in zip(segments, levels, strict=True)])
    timestep, indices = of_row.unique(return_inverse=True)
    found = {**arguments, **packed, "timestep": timestep, "timestep_indices": indices}
    for kind, name in (("video", "hidden_states"), ("audio", "audio_hidden_states"), ("text", "encoder_hidden_states")):
        rows = len(packed[f"{kind}_indices"])
        x = arguments[name]
        found[name] = torch.cat([torch.randn(2, max(rows - x.shape[1], 0), x.shape[2]), x], dim=1)[:, :rows]
    return found


def keyframes(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Pictures at the times of the clip's first frame and after its last, almost clean, and sound at a level of its own."""
    text, audio, video = h3_rows(arguments)
    first = video[1][: grid.h * grid.w]
    last = first + torch.tensor([4.5 * grid.t, 0, 0])
    rows = (text, ("video", first), ("video", last), audio, video)
    return h3_laid_out(arguments, *rows, levels=(0.2, 0.999, 0.999, 0.6, 0.2))


def references(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """A clip of another size with its sound before it, and a picture; then the target a while later."""
    text, audio, video = h3_rows(arguments)
    heard, seen = ("audio", audio[1][:6]), ("video", clip(Grid(2, 3, 2), 7.0))
    picture = ("video", clip(Grid(1, 2, 2), 20.0))
    later = torch.tensor([30.0, 0, 0])
    rows = (text, heard, seen, picture, ("audio", audio[1] + later), ("video", video[1] + later))
    return h3_laid_out(arguments, *rows, levels=(0.2, 1.0, 0.999, 0.999, 0.6, 0.2))


def no_sound(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Keyframes right before the target."""
    text, _, video = h3_rows(arguments)
    first = video[1][: grid.h * grid.w]
    return h3_laid_out(arguments, text, ("video", first), video)


def video_first(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    text, audio, video = h3_rows(arguments)
    return h3_laid_out(arguments, video, audio, text)


def levels_of_rows(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    rows = arguments["position_ids"].shape[0]
    return {**arguments, "timestep": torch.linspace(0, 1, 9), "timestep_indices": torch.arange(rows) % 9}


def picture_in_prompt(arguments: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Rows of the prompt that are tagged as video, and rows at the end that belong to nothing."""
    tags = torch.cat([arguments["token_tags"], torch.zeros(3, dtype=torch.long)])
    tags[2:5] = 0
    more = torch.nn.functional.pad
    return {
        **arguments,
        "token_tags": tags,
        "timestep_indices": more(arguments["timestep_indices"], (0, 3)),
        "position_ids": more(arguments["position_ids"], (0, 0, 0, 3), value=2.0),
    }


ROWS["MiniMaxH3Transformer3DModel"] = {
    "settings": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 6,
        "text_dim": 12,
        "freq_dim": 16,
        "time_embed_hidden_dim": 24,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    },
    "variants": {
        "plain": as_it_is,
        "keyframes": keyframes,
        "references": references,
        "no sound": no_sound,
        "video first": video_first,
        "per token": levels_of_rows,
        "picture in prompt": picture_in_prompt,
    },
}
