"""Which key blocks each query block visits: made block row by block row, so that no map of the whole is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops.blocks import Blocks

KEEP_BYTES = 1 << 26
"""A map of at most so many bytes is kept once it was made; larger ones are made again where they are needed again."""
CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Bytes of map held at a time, per kind of device."""


@dataclass
class BlockMap:
    """`rows(lo, hi)`: bool (B | 1, heads | 1, hi - lo, key blocks) of query blocks lo..hi, for `batch` samples and `heads` heads.

    Queries and keys stand in block order: block i is the tokens ``starts[i]..starts[i+1]``.
    """

    queries: Blocks
    keys: Blocks
    make: Callable[[int, int], Tensor]
    batch: int
    heads: int
    device: torch.device
    _kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of query blocks whose map is of bounded size."""
        row = self.batch * self.heads * self.keys.count
        step = max(1, CHUNK_BYTES.get(self.device.type, 1 << 26) // row)
        for lo in range(0, self.queries.count, step):
            yield lo, min(lo + step, self.queries.count)

    def rows(self, lo: int, hi: int) -> Tensor:
        """The map of query blocks lo..hi; without gradients, and the same each time. Raises UsageError for what is no map."""
        if (lo, hi) in self._kept:
            return self._kept[(lo, hi)]
        with torch.no_grad():
            found = self.make(lo, hi)
        if problem := misfit(found, self.batch, self.heads, hi - lo, self.keys.count):
            raise UsageError(f"block_map: query blocks {lo} to {hi - 1}: {problem}")
        if self.batch * self.heads * self.queries.count * self.keys.count <= KEEP_BYTES:
            self._kept[(lo, hi)] = found
        return found

    def pairs(self, batch: int, heads: int) -> int:
        """Query-key pairs visited, over batch and heads."""
        key_sizes = torch.tensor(self.keys.sizes, device=self.device, dtype=torch.float64)
        query_sizes = torch.tensor(self.queries.sizes, device=self.device, dtype=torch.float64)
        total = 0.0
        for lo, hi in self.chunks():
            chosen = self.rows(lo, hi)
            found = ((chosen.double() @ key_sizes) * query_sizes[lo:hi]).sum()
            total += float(found) * batch * heads / (chosen.shape[0] * chosen.shape[1])
        return round(total)


def misfit(found: Any, batch: int, heads: int, rows: int, blocks: int) -> str:
    """What is wrong with some rows of a map of `batch` samples and `heads` heads; empty where nothing is."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (rows, blocks)
    if fits and found.dtype == torch.bool:
        return ""
    allowed = " or ".join(dict.fromkeys(str((b, h, rows, blocks)) for b in (1, batch) for h in (1, heads)))
    got = f"{str(found.dtype).removeprefix('torch.')} {shape}" if isinstance(found, Tensor) else type(found).__name__
    return f"a map is bool {allowed}, got {got}"


@dataclass
class RowLists:
    """Key blocks of a chunk of query blocks as lists: row r visits ``indices[indptr[r] : indptr[r + 1]]``, ascending.

    Rows run over batch, heads and query blocks, in that order (compressed sparse rows).
    """

    indptr: Tensor
    indices: Tensor

    @property
    def counts(self) -> Tensor:
        return self.indptr[1:] - self.indptr[:-1]

    def table(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Lists of `rows` side by side: (rows, width) block indices, 0 past a list's end, and bool: which are of the list."""
        slots = torch.arange(width, device=rows.device)
        real = slots < self.counts[rows, None]
        at = (self.indptr[rows, None] + slots).clamp(max=max(0, self.indices.numel() - 1))
        return self.indices[at].masked_fill(~real, 0), real


def row_lists(chosen: Tensor, batch: int, heads: int) -> RowLists:
    """Bool (B | 1, heads | 1, rows, key blocks) → lists for every sample and head."""
    flat = chosen.expand(batch, heads, -1, -1).reshape(-1, chosen.shape[-1])
    counts = flat.sum(-1)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return RowLists(indptr, flat.nonzero()[:, 1])
