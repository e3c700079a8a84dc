"""Second moments of blocks: how keys vary inside a block, alone and with values. A few blocks at a time, in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops.blocks import Blocks, block_valid, padded
from .scene import Scene

STATE_BYTES = {"cpu": 1 << 21}
"""Bytes of block states (D x D per block and head) held at a time, per kind of device."""
STATE_BYTES_ELSEWHERE = 1 << 28


def in_blocks(z: Tensor, blocks: Blocks, lo: int, hi: int, valid: Tensor | None = None) -> Tensor:
    """Tokens of blocks lo..hi, zeros where there is none or it is not valid: (B, heads, N, D) → (B, heads, hi - lo, largest, D).

    fp32 or wider; valid (B, N).
    """
    tokens, some = slice(blocks.starts[lo], blocks.starts[hi]), blocks.between(lo, hi)
    wide = z[:, :, tokens].to(torch.promote_types(z.dtype, torch.float32))
    if valid is not None:
        wide = wide * valid[:, None, tokens, None]
    full, slots = padded(wide, some), block_valid(some, z.device)
    return full if slots is None else full * slots[:, :, None]


def state_steps(
    blocks: Blocks, count: int, batch_heads: int, dim: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Ranges of the first `count` blocks whose states are of bounded size."""
    step = max(1, _blocks_at_once(blocks, dim, device) // batch_heads)
    for lo in range(0, count, step):
        yield lo, min(lo + step, count)


def head_steps(scene: Scene) -> list[slice]:
    """Heads whose states of all selectable blocks are of bounded size; one at the least, for `state_steps` to cut."""
    batch, heads, _, dim = scene.k.shape
    most = _blocks_at_once(scene.place.keys, dim, scene.k.device)
    step = max(1, most // max(1, batch * scene.place.selectable))
    return [slice(lo, min(lo + step, heads)) for lo in range(0, heads, step)]


def _blocks_at_once(blocks: Blocks, dim: int, device: torch.device) -> int:
    """Blocks, over batch and heads, whose states are held at a time."""
    return STATE_BYTES.get(device.type, STATE_BYTES_ELSEWHERE) // (4 * dim * max(dim, blocks.largest))


def _centred(scene: Scene, k: Tensor, means: Tensor, lo: int, hi: int) -> Tensor:
    """Keys of blocks lo..hi less their block's mean, zeros where there is no valid key: (B, heads, blocks, largest, D)."""
    blocks, valid = scene.place.keys, scene.key_valid
    keys = in_blocks(k, blocks, lo, hi, valid)
    if valid is None and blocks.uniform:
        return keys - means[:, :, lo:hi, None]
    ones = means.new_ones(1 if valid is None else k.shape[0], 1, blocks.tokens, 1)
    return keys - means[:, :, lo:hi, None] * in_blocks(ones, blocks, lo, hi, valid)


def _steps(scene: Scene) -> Iterator[tuple[int, int]]:
    batch, heads, _, dim = scene.k.shape
    return state_steps(scene.place.keys, scene.place.selectable, batch * heads, dim, scene.k.device)


@torch.no_grad()
def log_variances(scene: Scene) -> Tensor:
    """(B, heads, selectable blocks): log of the trace of the covariance of a block's keys. Without gradients."""
    means = scene.k_means
    found = [_centred(scene, scene.k, means, lo, hi).square().sum((-1, -2)) for lo, hi in _steps(scene)]
    counts = scene.counts[:, :, : scene.place.selectable, 0].clamp(min=1)
    return (torch.cat(found, dim=2) / counts).clamp(min=1e-12).log()


@torch.no_grad()
def log_norms(scene: Scene) -> Tensor:
    """(B, heads, selectable blocks): ``log(||H_j||_F + 1e-5)``, ``H_j = sum_{r in j} (k_r - k̄_j)^T v_r`` (PISA). Without
    gradients; 2 N D² FLOPs per head."""
    means, found = scene.k_means, []
    for lo, hi in _steps(scene):
        states = _centred(scene, scene.k, means, lo, hi).transpose(-1, -2) @ in_blocks(
            scene.v, scene.place.keys, lo, hi
        )
        found.append(states.square().sum((-1, -2)).sqrt())
    return (torch.cat(found, dim=2) + 1e-5).log()


def first_order(scene: Scene) -> Tensor:
    """``sum_j H_j`` over the selectable blocks, (B, heads, D, Dv): what the distance of keys from their block's mean gives.

    2 N D² FLOPs per head; the backward computes the centred keys again.
    """

    def total(k: Tensor, v: Tensor, means: Tensor) -> Tensor:
        out = means.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
        for lo, hi in _steps(scene):
            values = in_blocks(v, scene.place.keys, lo, hi)
            out = out + _centred(scene, k, means, lo, hi).flatten(2, 3).transpose(-1, -2) @ values.flatten(2, 3)
        return out

    given = (scene.k, scene.v, scene.k_means)
    learns = torch.is_grad_enabled() and any(z.requires_grad for z in given)
    found: Tensor = checkpoint(total, *given, use_reentrant=False) if learns else total(*given)
    return found
