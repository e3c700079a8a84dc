"""Names and shapes of tiny checkpoints in the formats of other programs, written out by hand from their descriptions."""

from __future__ import annotations

import torch

DIM, FFN, TEXT, TIME, CHANNELS, HEADS = 24, 40, 16, 32, 4, 2


def wan(layers=2, dim=DIM):
    """Original Wan 2.1 layout: name → shape."""
    shapes = {"patch_embedding.weight": (dim, CHANNELS, 1, 2, 2), "patch_embedding.bias": (dim,)}

    def linear(name, out, into):
        shapes[f"{name}.weight"] = (out, into)
        shapes[f"{name}.bias"] = (out,)

    linear("text_embedding.0", dim, TEXT)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, TIME)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        for attention in ("self_attn", "cross_attn"):
            for which in "qkvo":
                linear(f"{block}.{attention}.{which}", dim, dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = (dim,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        linear(f"{block}.ffn.0", FFN, dim)
        linear(f"{block}.ffn.2", dim, FFN)
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", 4 * CHANNELS, dim)
    return shapes


def ultragen(layers=(1,), of=2, dim=DIM, rank=64):
    """The released layout: Wan's names and, for the sparse `layers`, the extra ones."""
    shapes = wan(of, dim)
    for i in layers:
        prefix = f"blocks.{i}.self_attn."
        for which in "qkv":
            for number in (1, 2):
                lora = f"{prefix}{which}_lora_{number}"
                shapes[f"{lora}.lora_A.weight"] = (rank, dim)
                shapes[f"{lora}.lora_A.bias"] = (rank,)
                shapes[f"{lora}.lora_B.weight"] = (dim, rank)
                shapes[f"{lora}.lora_B.bias"] = (dim,)
        for number in ("", "2"):
            for place, into in (("embedding{}.0", 256), ("embedding{}.2", dim), ("projection{}.1", dim)):
                name = f"{prefix}alpha_time_{place.format(number)}"
                shapes[f"{name}.weight"] = (dim, into)
                shapes[f"{name}.bias"] = (dim,)
        for suffix, k in (("", 4), ("_hierachcal", 2)):
            shapes[f"{prefix}downsample_conv{suffix}.weight"] = (dim, 1, k, k)
            shapes[f"{prefix}downsample_conv{suffix}.bias"] = (dim,)
            shapes[f"{prefix}upsample_conv{suffix}.weight"] = (dim, 1, 3, 3, 3)
            shapes[f"{prefix}upsample_conv{suffix}.bias"] = (dim,)
    return shapes


def tensors(shapes, dtype=torch.float32, seed=0):
    """A state dict of random numbers; no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
