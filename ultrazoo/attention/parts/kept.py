"""Rows of a block map as they are kept between denoising steps: lists of visited blocks, or bits where those are smaller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COUNT_BYTES = 4
"""Bytes of one row's number of visited blocks."""


def index_bytes(blocks: int) -> int:
    """Bytes of the index of one of so many key blocks."""
    return 2 if blocks <= 1 << 16 else 4


def kept_bytes(rows: int, blocks: int, visited: int) -> int:
    """Bytes of `rows` rows of `blocks` key blocks with `visited` ones among them all: the smaller of both forms."""
    return min(rows * COUNT_BYTES + visited * index_bytes(blocks), -(-rows * blocks // 8))


@dataclass(frozen=True)
class KeptRows:
    """A bool tensor (…, key blocks) in the machine's memory; `counts` per row with lists, None with packed bits."""

    shape: tuple[int, ...]
    data: np.ndarray
    counts: np.ndarray | None

    @classmethod
    def of(cls, found: Tensor) -> KeptRows:
        shape = tuple(found.shape)
        blocks = shape[-1]
        flat = found.cpu().numpy().reshape(-1, blocks)
        counts = np.count_nonzero(flat, axis=1).astype(np.int32)
        bits = -(-flat.size // 8)
        if counts.size * COUNT_BYTES + int(counts.sum()) * index_bytes(blocks) < bits:
            kind = np.uint16 if index_bytes(blocks) == 2 else np.int32
            return cls(shape, (np.flatnonzero(flat) % blocks).astype(kind), counts)
        return cls(shape, np.packbits(flat), None)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.counts is None else self.counts.nbytes)

    def rows(self, device: torch.device) -> Tensor:
        """The tensor it was made of."""
        if self.counts is None:
            flat = np.unpackbits(self.data, count=int(np.prod(self.shape)))
            return torch.from_numpy(flat.view(bool).reshape(self.shape)).to(device)
        counts = torch.from_numpy(self.counts).to(device)
        first = torch.arange(len(self.counts), device=device) * self.shape[-1]
        at = first.repeat_interleave(counts) + torch.from_numpy(self.data.astype(np.int32)).to(device)
        out = torch.zeros(self.shape, dtype=torch.bool, device=device)
        out.view(-1)[at] = True
        return out
