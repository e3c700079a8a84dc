"""Consecutive runs of tokens: the blocks of block-sparse attention, of any sizes, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """`starts`: the first token of every block, then the number of tokens. No block is empty."""

    starts: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of every block, int64."""
        return np.diff(np.asarray(self.starts, dtype=np.int64))

    @cached_property
    def largest(self) -> int:
        return int(self.sizes.max())

    @property
    def uniform(self) -> bool:
        return self.tokens == self.count * self.largest

    @property
    def short_end(self) -> bool:
        """Are all blocks equal but the last?"""
        return self.count * self.largest - self.tokens == self.largest - int(self.sizes[-1])

    def then(self, other: Blocks) -> Blocks:
        """These blocks and then the other ones."""
        return Blocks(self.starts[:-1] + tuple(self.tokens + start for start in other.starts))

    def between(self, lo: int, hi: int) -> Blocks:
        """Blocks lo..hi, their first token being 0."""
        first = self.starts[lo]
        return Blocks(tuple(start - first for start in self.starts[lo : hi + 1]))


def even_blocks(tokens: int, size: int) -> Blocks:
    """Blocks of `size` tokens and a shorter last one."""
    return Blocks((*range(0, tokens, size), tokens))


def of_sizes(sizes: np.ndarray) -> Blocks:
    """Blocks of these sizes in order."""
    return Blocks((0, *np.cumsum(sizes).tolist()))


@lru_cache(maxsize=16)
def block_index(blocks: Blocks, device: torch.device) -> Tensor:
    """(count, largest) token of every slot; slots past a block's end repeat its last token."""
    starts = torch.tensor(blocks.starts, device=device)
    slots = torch.arange(blocks.largest, device=device)
    return torch.minimum(starts[:-1, None] + slots, starts[1:, None] - 1)


@lru_cache(maxsize=16)
def block_valid(blocks: Blocks, device: torch.device) -> Tensor | None:
    """(count, largest) bool: which slots are real; None where all are."""
    if blocks.uniform:
        return None
    sizes = torch.tensor(blocks.sizes, device=device)
    return torch.arange(blocks.largest, device=device) < sizes[:, None]


def padded(z: Tensor, blocks: Blocks) -> Tensor:
    """(B, heads, N, …) → (B, heads, count, largest, …); what stands in slots past a block's end is finite and arbitrary."""
    if blocks.uniform:
        return z.unflatten(2, (blocks.count, blocks.largest))
    if blocks.short_end:
        lack = blocks.count * blocks.largest - blocks.tokens
        tail = z.new_zeros(*z.shape[:2], lack, *z.shape[3:])
        return torch.cat([z, tail], dim=2).unflatten(2, (blocks.count, blocks.largest))
    index = block_index(blocks, z.device)
    return z.index_select(2, index.flatten()).unflatten(2, index.shape)


def unpadded(z: Tensor, blocks: Blocks) -> Tensor:
    """The inverse of `padded`: (B, heads, count, largest, …) → (B, heads, N, …)."""
    flat = z.flatten(2, 3)
    if blocks.uniform:
        return flat
    if blocks.short_end:
        return flat[:, :, : blocks.tokens]
    valid = block_valid(blocks, z.device)
    assert valid is not None
    return flat.index_select(2, valid.flatten().nonzero()[:, 0])


def block_sums(z: Tensor, blocks: Blocks, valid: Tensor | None = None) -> Tensor:
    """Sums over the tokens of every block: (B, heads, N, D) → (B, heads, count, D), fp32 or wider.

    valid (B, N): False tokens count as nothing.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if valid is not None:
        wide = wide * valid[:, None, :, None]
    slots = block_valid(blocks, z.device)
    full = padded(wide, blocks)
    if slots is not None:
        full = full * slots[:, :, None]
    return full.sum(dim=3)


def block_counts(blocks: Blocks, device: torch.device, valid: Tensor | None = None) -> Tensor:
    """Valid tokens of every block, fp32: (1, 1, count, 1), or (B, 1, count, 1) where tokens differ in validity."""
    if valid is None:
        return torch.tensor(blocks.sizes, device=device, dtype=torch.float32)[None, None, :, None]
    ones = torch.ones(valid.shape[0], 1, blocks.tokens, 1, device=device)
    return block_sums(ones, blocks, valid)


def block_means(z: Tensor, blocks: Blocks, valid: Tensor | None = None) -> Tensor:
    """Means over the valid tokens of every block, zero where there is none: (B, heads, count, D), fp32 or wider."""
    sums = block_sums(z, blocks, valid)
    return sums / block_counts(blocks, z.device, valid).clamp(min=1.0).to(sums.dtype)
