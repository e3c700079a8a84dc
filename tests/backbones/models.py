"""Tiny random backbones, and the same weights in diffusers' models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultrazoo.attention.full import FullSpec
from ultrazoo.backbones.dit import Dit, DitSpec, Latent
from ultrazoo.backbones.wan import Wan, WanSpec
from ultrazoo.grid import Grid

TINY_WAN = {
    "dim": 48,
    "layers": 3,
    "heads": 2,
    "ffn_dim": 80,
    "channels": 4,
    "text_dim": 12,
    "text_tokens": 7,
    "time_dim": 32,
}
TINY_DIT = {"dim": 48, "layers": 3, "heads": 2, "classes": 10, "latent": Latent(channels=4)}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, none zero: modulation, gates and output layers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
                value = 1 + 0.3 * value
            elif parameter.ndim > 1 and "modulation" not in name.split(".")[-1]:
                value = value / parameter[0].numel() ** 0.5
            else:
                value = 0.3 * value
            parameter.copy_(value)
    return model


def tiny_wan(grid: Grid = Grid(3, 4, 6), seed: int = 0, steps=(), attention=None, **changes) -> Wan:
    spec = WanSpec(**{**TINY_WAN, **changes})
    model = Wan(spec, attention or [FullSpec()] * spec.layers, grid, steps)
    return randomise(model, seed)


def tiny_dit(grid: Grid = Grid(1, 4, 6), seed: int = 0, attention=None, **changes) -> Dit:
    spec = DitSpec(**{**TINY_DIT, **changes})
    return randomise(Dit(spec, attention or [FullSpec()] * spec.layers, grid), seed)


def wan_inputs(
    size: tuple[int, int, int], batch: int = 2, timestep: str = "sample", spec: WanSpec | None = None, seed=1
):
    """latents, timestep and text; `timestep` is sample, frame, token or constant (one value, given per token)."""
    spec = spec or WanSpec(**TINY_WAN)
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = size
    tokens = frames * (height // 2) * (width // 2)
    shape = {"sample": (batch,), "frame": (batch, frames), "token": (batch, tokens)}[timestep]
    return (
        3 * torch.randn(batch, spec.channels, *size, generator=generator),
        torch.rand(shape, generator=generator) * 1000,
        3 * torch.randn(batch, spec.text_tokens, spec.text_dim, generator=generator),
    )


def diffusers_wan(model: Wan) -> nn.Module:
    """diffusers' WanTransformer3DModel with the weights of `model`."""
    from diffusers import WanTransformer3DModel

    wanted = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    wanted += ("freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps")
    other = WanTransformer3DModel(**{name: model.config[name] for name in wanted})
    other.load_state_dict({diffusers_name(name): value for name, value in model.state_dict().items()}, strict=True)
    return other


def diffusers_name(name: str) -> str:
    """A parameter name of ours as diffusers spells it."""
    for ours, theirs in (
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.head", "proj_out"),
        ("head.modulation", "scale_shift_table"),
        (".modulation", ".scale_shift_table"),
        (".norm3.", ".norm2."),
        (".ffn.0.", ".ffn.net.0.proj."),
        (".ffn.2.", ".ffn.net.2."),
        (".self_attn.", ".attn1."),
        (".cross_attn.", ".attn2."),
        (".q.", ".to_q."),
        (".k.", ".to_k."),
        (".v.", ".to_v."),
        (".o.", ".to_out.0."),
    ):
        name = name.replace(ours, theirs)
    return name


def diffusers_dit(model: Dit, side: int) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the weights of `model`, for square latents of `side`."""
    from diffusers import DiTTransformer2DModel

    spec = model.spec
    other = DiTTransformer2DModel(
        num_attention_heads=spec.heads,
        attention_head_dim=spec.dim // spec.heads,
        in_channels=spec.latent.channels,
        out_channels=spec.latent.channels * spec.outputs,
        num_layers=spec.layers,
        sample_size=side,
        patch_size=spec.patch,
        num_embeds_ada_norm=spec.classes,
        norm_eps=spec.eps,
    ).eval()
    for block in other.transformer_blocks:
        # diffusers spaces the time's frequencies by half - 1, the original and we by half
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    ours = model.state_dict()
    state: dict[str, Tensor] = {
        "pos_embed.proj.weight": ours["patch_embedding.weight"][:, :, 0],
        "pos_embed.proj.bias": ours["patch_embedding.bias"],
        "proj_out_1.weight": ours["head.modulation.1.weight"],
        "proj_out_1.bias": ours["head.modulation.1.bias"],
        "proj_out_2.weight": ours["head.head.weight"],
        "proj_out_2.bias": ours["head.head.bias"],
    }
    for i in range(spec.layers):
        theirs, mine = f"transformer_blocks.{i}", f"blocks.{i}"
        for part in ("weight", "bias"):
            # diffusers keeps the embeddings of time and class in every block
            state[f"{theirs}.norm1.emb.timestep_embedder.linear_1.{part}"] = ours[f"time_embedding.0.{part}"]
            state[f"{theirs}.norm1.emb.timestep_embedder.linear_2.{part}"] = ours[f"time_embedding.2.{part}"]
            state[f"{theirs}.norm1.linear.{part}"] = ours[f"{mine}.modulation.1.{part}"]
            state[f"{theirs}.ff.net.0.proj.{part}"] = ours[f"{mine}.ffn.0.{part}"]
            state[f"{theirs}.ff.net.2.{part}"] = ours[f"{mine}.ffn.2.{part}"]
            for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                state[f"{theirs}.attn1.{a}.{part}"] = ours[f"{mine}.self_attn.{b}.{part}"]
        state[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = ours["label_embedding.weight"]
    other.load_state_dict(state, strict=True)
    return other
