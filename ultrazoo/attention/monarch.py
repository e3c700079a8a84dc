"""MonarchRT (arXiv 2602.12271): attention over a video as the product of two factors, one along rows and one across them.

For query (a, i, j) = (frame, row, column) and key (f, k, l):
``R[a,f,k,j,:] = softmax_l(s q_{a,k,j} . K_{f,k,l})``, the query at row k looking along key row k, with mean key
``kbar = R K``; ``L[a,j,i,(f,k)] = softmax_{f,k}(s q_{a,i,j} . kbar_{a,f,k,j} + entropy(R))``; ``o = sum_{f,k} L (R V)``.
Further iterations put, for the query of R, the mean of the column's queries weighted by L. Exact where H or W is 1.

Both factors go through the kernel door: entropy(R) is R's log-sum-exp less ``s q . kbar``, and enters L as a weight of the
key. Sub-tiling follows the released code (34867c0): `h_reduce` bands of rows and `w_reduce` strips of columns count as
frames of their own, the rows of `f_tied` frames as rows of one. The block-causal and cached forms are left out.

Ours, where the source has whole rectangular frames, sizes that divide and no text: extra keys join the softmax of L; a row
of keys without a real token is left out; where the token at row k is not real, R looks with a query of zero. Where a number
does not divide its axis, the last band, strip or group of frames is shorter (there may be fewer of them than asked for):
its missing tokens are not real, so they are computed and never seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import Problem
from ..grid import Grid
from ..kernels import attend
from ..ops.precision import wide_dtype
from ..ports import EXPORTS
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Extra, Host, grid_positions, refuse_segments
from .full import kernel_problems
from .grouped import attend_extra

CHUNK_BYTES = {"cpu": 1 << 28}
"""Most bytes of looks and means at a time, per kind of device: for every query column there are as many as key rows."""
CHUNK_BYTES_ELSEWHERE = 1 << 30
COPIES = 9
"""Head vectors alive at once for a query column and a key row: a look, two means, the same turned, fp32 copies in between."""
SAVED = 12
"""Head vectors that autograd keeps for them where one chunk holds all; several chunks are computed again instead."""


@dataclass(frozen=True, kw_only=True)
class MonarchSpec(AttentionSpec):
    """Every token sees every token through a factor along rows and a factor over frames and rows."""

    name: ClassVar[str] = "monarch"
    source: ClassVar[str] = "MonarchRT, arXiv 2602.12271"
    formula: ClassVar[str] = (
        "o = sum_fk softmax_fk(q . kbar + H(R)) (R V), R = softmax_l(q_k . K_fkl), kbar = R K, H the entropy"
    )

    iterations: int = option(1, "alternations of R and L", ge=1)
    h_reduce: int = option(1, "bands of rows that count as frames; the last may be shorter", ge=1)
    w_reduce: int = option(1, "strips of columns that count as frames; the last may be narrower", ge=1)
    f_tied: int = option(1, "frames whose rows count as rows of one frame; the last may be fewer", ge=1)
    kernel: str = option(
        "auto", "a registered kernel, or auto, for L and extra rows; R wants a log-sum-exp and takes auto"
    )

    def problems(self, site: Site) -> list[Problem]:
        return kernel_problems(self.kernel, ("log_weight",))

    @property
    def tiled(self) -> bool:
        return (self.f_tied, self.h_reduce, self.w_reduce) != (1, 1, 1)

    def tiles(self, grid: Sequence[int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """How many groups of frames, bands and strips there are, and how many frames, rows and columns the largest has."""
        t, h, w = grid
        size = (min(self.f_tied, t), -(-h // self.h_reduce), -(-w // self.w_reduce))
        return (-(-t // size[0]), -(-h // size[1]), -(-w // size[2])), size

    def cube(self, grid: Sequence[int]) -> tuple[int, int, int]:
        """(frames, rows, columns) after sub-tiling; the missing tokens of shorter tiles included."""
        (groups, bands, strips), (tied, height, width) = self.tiles(grid)
        return groups * bands * strips, height * tied, width

    def cost(self, site: Site) -> Cost:
        tokens, inner, extra = site.tokens, site.inner, site.extra_tokens
        frames, rows, columns = self.cube(site.grid)
        # where sub-tiling does not divide, more than there are tokens
        places = frames * rows * columns
        along, across, beside = places * frames * columns, places * frames * rows, places * extra
        more = self.iterations - 1
        # a refinement needs mean keys alone of R, log-sum-exps alone of L, and the mean queries
        row_pairs, column_pairs = along * (1 + more), across * (1 + 2 * more) + beside * (1 + more)
        row_flops = along * inner * (6 + 4 * more)
        column_flops = 4 * (across + beside) * inner
        column_flops += more * (2 * (across + beside) * (inner + site.heads) + 4 * across * inner)
        extra_pairs = extra * (tokens + extra)
        qkv = 2 * tokens * site.dim * 3 * site.width
        # means of every column of every query frame, unless they come in chunks
        means = frames * places
        at_once = max(frames * rows, min(means, CHUNK_BYTES_ELSEWHERE // (2 * COPIES * inner)))
        return Cost(
            pairs=row_pairs + column_pairs + extra_pairs,
            attention_flops=row_flops + column_flops + 4 * extra_pairs * inner,
            qkv_flops=qkv,
            out_flops=2 * tokens * inner * site.dim,
            peak_elements=(tokens + 4 * places) * site.width + COPIES * at_once * inner,
            saved_elements=(7 + 2 * site.qk_norm) * places * site.width + SAVED * (at_once == means) * means * inner,
            branches=(
                BranchCost("along_rows", row_pairs, row_flops, qkv),
                BranchCost("across_rows", column_pairs + extra_pairs, column_flops + 4 * extra_pairs * inner),
            ),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        return np.ones((1, count, site.tokens), dtype=bool)

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(tokens.any(axis=1, keepdims=True), tokens.shape)

    def traits(self) -> Traits:
        notes = "full attention where H or W is 1"
        if self.tiled:
            notes += "; sub-tiling wants sizes that are plain ints"
        return Traits(
            start=Start("needs tuning", "MonarchRT, arXiv 2602.12271: 600 iterations of Self-Forcing; runs without"),
            export=() if self.tiled else EXPORTS,
            softmax=False,
            notes=notes,
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True)
        image = site.at(dim=20, grid=Grid(1, 4, 5), rope=None, has_timestep=False)
        text = site.at(grid=Grid(2, 3, 4), extra=(Segment("text", 4),))
        bare = site.at(grid=Grid(2, 4, 6), qk_norm=False)
        return [
            (cls(), site),
            (cls(iterations=3), image),
            (cls(iterations=2), text),
            (cls(h_reduce=2, w_reduce=3), bare),
            (cls(f_tied=2, h_reduce=3, w_reduce=4), text.at(grid=Grid(3, 4, 5))),
        ]


class MonarchAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D). No parameters."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        valid = self._real(call, x)
        factors = Factors(spec, self._cubes(k, call.grid), self._cubes(v, call.grid), valid, call.extra)
        # (B, frames, rows, columns, heads, D)
        y = self._tokens(self._in_chunks(factors, self._cubes(q, call.grid), valid), call.grid)
        out = host.out(y.flatten(2))
        if call.extra is None:
            return out
        return out, attend_extra(call.extra, k, v, call.key_valid, spec.kernel)

    def _in_chunks(self, factors: Factors, q: Tensor, valid: Tensor | None) -> Tensor:
        """Some query frames at a time, or some columns of one: their means are as many as key rows for every column."""
        _, frames, rows, columns, heads, channels = q.shape
        if self.traced or torch.compiler.is_compiling():
            return factors(q, valid)
        limit = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES_ELSEWHERE)
        allowed = max(1, limit // (COPIES * q.shape[0] * heads * channels * q.element_size() * frames * rows))
        if allowed >= frames * columns:
            return factors(q, valid)
        tracked = torch.is_grad_enabled() and (q.requires_grad or factors.kv.requires_grad)
        some_frames, some_columns = max(1, allowed // columns), min(allowed, columns)
        parts = []
        for start in range(0, frames, some_frames):
            across = []
            for left in range(0, columns, some_columns):
                place = (slice(None), slice(start, start + some_frames), slice(None), slice(left, left + some_columns))
                part, real = q[place], None if valid is None else valid[place]
                if tracked:
                    across.append(checkpoint(factors, part, real, use_reentrant=False))
                else:
                    across.append(factors(part, real))
            parts.append(torch.cat(across, dim=3))
        return torch.cat(parts, dim=1)

    def _real(self, call: Call, x: Tensor) -> Tensor | None:
        """Which places of the cubes hold a real token, bool (B, frames, rows, columns); None: all."""
        spec: Any = self.spec
        valid = call.key_valid
        if valid is None and math.prod(spec.cube(call.grid)) == x.shape[1]:
            return None
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self._cubes(valid, call.grid)

    def _cubes(self, z: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, N, …) → (B, frames, rows, columns, …), zero where a tile lacks tokens."""
        spec: Any = self.spec
        z = z.unflatten(1, (grid[0], grid[1], grid[2]))
        if not spec.tiled:
            return z
        (t, bands, strips), (tied, h, w) = spec.tiles(grid)
        missing = [
            count * size - have for count, size, have in zip((t, bands, strips), (tied, h, w), grid, strict=True)
        ]
        if any(missing):
            ends = [(0, 0)] * (z.dim() - 4) + [(0, lack) for lack in reversed(missing)]
            z = F.pad(z, [number for pair in ends for number in pair])
        z = z.unflatten(3, (strips, w)).unflatten(2, (bands, h)).unflatten(1, (t, tied))
        # (B, t, tied, bands, h, strips, w, …)
        rest = range(7, z.dim())
        return z.permute(0, 1, 3, 5, 2, 4, 6, *rest).flatten(4, 5).flatten(1, 3)

    def _tokens(self, z: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, frames, rows, columns, heads, D) → (B, N, heads, D)."""
        spec: Any = self.spec
        if spec.tiled:
            (t, bands, strips), (tied, h, _) = spec.tiles(grid)
            z = z.unflatten(2, (tied, h)).unflatten(1, (t, bands, strips))
            # (B, t, bands, strips, tied, h, w, heads, D)
            z = z.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
            z = z[:, : grid[0], : grid[1], : grid[2]]
        return z.flatten(1, 3)


class Factors:
    """Keys and values (B, F, I, J, heads, D) of one call, and both factors for some columns of query frames.

    `real` (B, F, I, J) says which tokens are.
    """

    def __init__(self, spec: MonarchSpec, k: Tensor, v: Tensor, real: Tensor | None, extra: Extra | None):
        self.spec, self.extra = spec, extra
        self.batch, self.frames, self.rows, _, _, self.channels = k.shape
        self.scale = self.channels**-0.5
        self.k = _by_rows(k)  # (B*F*I, heads, J, D)
        self.kv = torch.cat([self.k, _by_rows(v)], dim=-1)
        self.row_mask: Tensor | None = None
        self.has_key: Tensor | None = None
        if real is not None:
            self.has_key = real.any(-1).flatten(1)  # (B, F*I)
            # rows without a key stay open in R, so that no softmax is over nothing, and are closed in L
            self.row_mask = (real | ~real.any(-1, keepdim=True)).flatten(0, 2)[:, None, None]

    def __call__(self, q: Tensor, real: Tensor | None) -> Tensor:
        """Queries (B, n, I, j, heads, D), any frames and columns, and which are real → the same shape."""
        size = (q.shape[1], q.shape[3])
        columns = q.permute(0, 1, 3, 4, 2, 5).flatten(0, 2)  # (B*n*j, heads, I, D)
        looks = self._looks(q, real)  # (B*F*I, heads, n*j, D)
        for _ in range(self.spec.iterations - 1):
            looks = self._refined(looks, columns, real, size)
        means, lse = attend(looks, self.k, self.kv, key_mask=self.row_mask, return_lse=True)
        weight = self._entropy(looks, means[..., : self.channels], lse, size)
        mean_k, mean_v = self._turned(means, size).split(self.channels, dim=-1)  # (B*n*j, heads, F*I, D)
        k, v, mask, weight = self._joined(mean_k, mean_v, weight, size)
        y = attend(columns, k, v, key_mask=mask, log_weight=weight, kernel=self.spec.kernel)
        assert isinstance(y, Tensor)
        y = y.unflatten(0, (self.batch, *size))  # (B, n, j, heads, I, D)
        return y.permute(0, 1, 4, 2, 3, 5)

    def _looks(self, q: Tensor, real: Tensor | None) -> Tensor:
        """Who looks along each key row at first: the queries at that row, the same for every key frame."""
        if real is not None:
            q = q.masked_fill(~real[..., None, None], 0.0)
        looks = q.permute(0, 2, 4, 1, 3, 5).unsqueeze(1)  # (B, 1, I, heads, n, j, D)
        return looks.expand(-1, self.frames, -1, -1, -1, -1, -1).flatten(4, 5).flatten(0, 2)

    def _refined(self, looks: Tensor, columns: Tensor, real: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The mean of each column's queries, weighted by what L gives the key row: ``sum_i L q / sum_i L``.

        L is ``exp(s q . kbar + H - lse)``, in which H is the same for every i: a softmax over the queries with weights
        ``-lse``, which never divides by a vanishing mass. In the wide dtype: lse has the size of the logits.
        """
        wide = wide_dtype(looks.dtype)
        looks, columns, k = looks.to(wide), columns.to(wide), self.k.to(wide)
        means, lse = attend(looks, k, k, key_mask=self.row_mask, return_lse=True)
        weight = self._entropy(looks, means, lse, size)
        mean_k = self._turned(means, size)
        more_k, _, mask, weight = self._joined(mean_k, mean_k, weight, size)
        _, lse = attend(columns, more_k, more_k[..., :1], key_mask=mask, log_weight=weight, return_lse=True)
        # a sample without a real key has no mass anywhere: nobody is to be preferred there
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        counted = None
        if real is not None:
            real = real.transpose(2, 3).flatten(0, 2)  # (B*n*j, I)
            # a column without a real token has no real query that would read it
            counted = (real | ~real.any(-1, keepdim=True))[:, None, None]
        found = attend(mean_k, columns, columns, key_mask=counted, log_weight=-lse.unsqueeze(2))
        assert isinstance(found, Tensor)
        found = found.unflatten(2, (self.frames, self.rows)).unflatten(0, (self.batch, *size))
        return found.permute(0, 4, 5, 3, 1, 2, 6).flatten(4, 5).flatten(0, 2).to(self.k.dtype)

    def _entropy(self, looks: Tensor, mean_k: Tensor, lse: Tensor, size: tuple[int, int]) -> Tensor:
        """Entropy of every row of R: (B*n*j, heads, 1, F*I)."""
        found = lse - self.scale * (looks.to(lse.dtype) * mean_k.to(lse.dtype)).sum(-1)
        return self._turned(found.unsqueeze(-1), size).transpose(2, 3)

    def _turned(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """(B*F*I, heads, n*j, c) → (B*n*j, heads, F*I, c)."""
        z = z.unflatten(2, size).unflatten(0, (self.batch, self.frames, self.rows))
        return z.permute(0, 4, 5, 3, 1, 2, 6).flatten(4, 5).flatten(0, 2)

    def _joined(
        self, k: Tensor, v: Tensor, weight: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Keys, values, key mask and log-weights of L, extra tokens at the end."""
        extra, repeat = self.extra, size[0] * size[1]
        mask = self.has_key
        if extra is not None:
            if mask is not None or extra.key_mask is not None:
                shape = (self.batch, self.frames * self.rows)
                own = torch.ones(shape, dtype=torch.bool, device=k.device) if mask is None else mask
                more = (
                    torch.ones_like(extra.k[..., 0, 0], dtype=torch.bool) if extra.key_mask is None else extra.key_mask
                )
                mask = torch.cat([own, more], dim=1)
            added = (z.transpose(1, 2).repeat_interleave(repeat, dim=0).to(k.dtype) for z in (extra.k, extra.v))
            k, v = (torch.cat([z, other], dim=2) for z, other in zip((k, v), added, strict=True))
            weight = F.pad(weight, (0, extra.k.shape[1]))
        if mask is not None:
            mask = mask.repeat_interleave(repeat, dim=0)[:, None, None]
        return k, v, mask, weight


def _by_rows(z: Tensor) -> Tensor:
    """(B, F, I, J, heads, D) → (B*F*I, heads, J, D)."""
    return z.transpose(3, 4).flatten(0, 2)


MonarchSpec.module = MonarchAttention
