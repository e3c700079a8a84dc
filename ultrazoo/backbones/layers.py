"""Pieces that diffusion transformers share: modulated norm, gated residual, chunked feed-forward, patches back to latents.

Modulation comes as (B, G, C): G = 1 for a timestep per sample, T per frame, N per token; every group rules N/G
consecutive tokens. Its arithmetic is at least fp32 whatever the dtype of the stream, as in the models' own code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.init import Value, marked
from ..ops.norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension, statistics in fp32: (…, C) → (…, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # type: ignore[arg-type]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that modulation is computed in: fp32, or fp64 for an fp64 model."""
    return torch.promote_types(dtype, torch.float32)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``: x (B, N, C), shift and scale (B, G, C) → (B, N, C) in the dtype of x."""
    groups = (shift.shape[1], -1)
    return (
        torch.addcmul(
            shift[:, :, None], F.layer_norm(x, (x.shape[-1],), eps=eps).unflatten(1, groups), 1 + scale[:, :, None]
        )
        .flatten(1, 2)
        .to(x.dtype)
    )


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate * y``: x and y (B, N, C), gate (B, G, C) → (B, N, C) in the dtype of x."""
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), y.unflatten(1, groups), gate[:, :, None]).flatten(1, 2).to(x.dtype)


def in_chunks(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int | None) -> Tensor:
    """Apply a token-wise `run` to (B, N, C), `tokens` tokens of the sequence at a time; None means all at once.

    Without gradients the hidden width of `run` lives for one chunk only. Compiled and traced graphs take all at once:
    the number of chunks would become part of the graph.
    """
    if tokens is None or traced() or x.shape[1] <= tokens:
        return run(x)
    if torch.is_grad_enabled():
        return torch.cat([run(part) for part in x.split(tokens, dim=1)], dim=1)
    out = torch.empty_like(x)
    for part, target in zip(x.split(tokens, dim=1), out.split(tokens, dim=1), strict=True):
        target.copy_(run(part))
    return out


def tokens_of(latents: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The token grid of latents (B, c, F, h, w)."""
    frames, height, width = latents.shape[2:]
    return (frames // patch[0], height // patch[1], width // patch[2])


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Tokens (B, T*H*W, pt*ph*pw*channels) → latents (B, channels, T*pt, H*ph, W*pw)."""
    x = x.unflatten(1, grid).unflatten(-1, (*patch, -1))
    # (B, T, H, W, pt, ph, pw, c) → (B, c, T, pt, H, ph, W, pw)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def traced() -> bool:
    """Whether this call is being compiled, exported or traced, so that sizes may be symbols."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def timestep_groups(timestep: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B,), (B, T) or (B, N) → (B, G) with G in {1, T, N}; raises UsageError for another shape."""
    if timestep.ndim == 1:
        return timestep[:, None]
    t, h, w = grid
    if timestep.ndim != 2 or (not traced() and timestep.shape[1] not in (1, t, t * h * w)):
        raise UsageError(
            f"timestep has shape {tuple(timestep.shape)}; it is (B,), (B, T) = (B, {t}) or (B, N) = (B, {t * h * w})"
        )
    return timestep


def start_linears(module: nn.Module, weight: Value, bias: Value) -> None:
    """Say how every linear and patch convolution inside `module` starts; attentions speak for themselves."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv3d) and ".attention." not in f".{name}.":
            marked(child, weight=weight, bias=bias)
