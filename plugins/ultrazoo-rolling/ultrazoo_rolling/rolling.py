"""Frames attend in chunks to themselves, a window of past frames and the first frames of the video.

The attention pattern of streaming video diffusion: a model that makes a video chunk by chunk may look back only (chunk
causality: CausVid, arXiv 2412.07772; chunks of 3 latent frames: Self Forcing, arXiv 2506.08009), only so far (a rolling
window keeps cost per second of video constant), and always at the opening frames (frame sinks keep a long video from
drifting: LongLive, arXiv 2509.22622). With ``ahead`` it is the banded, bidirectional form for models that see the whole
clip at once.

Every chunk is one dense attention call on a slice of frames: no mask and no padding, at any (T, H, W). Departure from the
papers: positions stay those of the whole video; a rolling cache that re-indexes them belongs to a sampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ultrazoo.attention.contract import Attention, Call, Host, grid_positions, refuse_segments
from ultrazoo.errors import Problem
from ultrazoo.grid import Grid
from ultrazoo.kernels import attend
from ultrazoo.spec import AttentionSpec, BranchCost, Cost, Rope, Site, Start, Traits, option

from .spans import Span, spans


@dataclass(frozen=True, kw_only=True)
class RollingSpec(AttentionSpec):
    """Chunks of frames see themselves, ``window`` frames before, ``ahead`` frames after, and the first ``sinks`` frames.

    The defaults are those of published streaming models: chunks of 3 latent frames, 3 sink frames, and 6 frames of past,
    which makes a cache of 12 frames with the chunk itself.
    """

    name: ClassVar[str] = "longvideo/rolling"
    source: ClassVar[str] = "CausVid, arXiv 2412.07772; Self Forcing, arXiv 2506.08009; LongLive, arXiv 2509.22622"
    formula: ClassVar[str] = (
        "y_i = W_o sum_{j in the first frames and the last ones up to i's chunk} softmax(q_i k_j / sqrt(D)) v_j"
    )

    chunk: int = option(3, "frames that are made together and see each other", ge=1)
    window: int = option(6, "frames before its chunk that a frame sees", ge=0)
    sinks: int = option(3, "frames at the start of the video that every later frame sees", ge=0)
    ahead: int = option(0, "frames after its chunk that a frame sees; 0 is causal", ge=0)
    kernel: str = option("auto", "a registered kernel, or auto", kind="kernel")

    def spans(self, frames: int) -> Iterator[Span]:
        return spans(frames, self.chunk, self.window, self.sinks, self.ahead)

    def problems(self, site: Site) -> list[Problem]:
        if self.ahead > 0 and self.sinks > 0 and self.window == 0:
            rule = "a window that looks ahead but not back, with sinks, is none of the published designs"
            return [Problem("window", rule, "give window, or set sinks to 0")]
        return []

    def cost(self, site: Site) -> Cost:
        frames, area = site.grid.t, site.grid.h * site.grid.w
        tokens, extra = site.tokens, site.extra_tokens
        pairs = sum((span.last - span.first) * span.frames for span in self.spans(frames)) * area * area
        # extra keys are seen by every query; extra queries see everything
        pairs += tokens * extra + extra * (tokens + extra)
        flops = 4 * pairs * site.inner
        projections = 2 * tokens * site.dim * 3 * site.width
        widest = max(span.frames for span in self.spans(frames)) * area
        return Cost(
            pairs=pairs,
            attention_flops=flops,
            qkv_flops=projections,
            out_flops=2 * tokens * site.inner * site.dim,
            # q, k, v and the output, and one chunk's keys and values where sinks make them a copy
            peak_elements=5 * tokens * site.width + 2 * widest * site.width,
            saved_elements=7 * tokens * site.width + tokens * site.heads,
            branches=(BranchCost("rolling", pairs, flops, projections),),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        frames, area = site.grid.t, site.grid.h * site.grid.w
        rows = np.zeros((frames, frames), dtype=bool)
        for span in self.spans(frames):
            rows[span.first : span.last] = [span.sees(frame) for frame in range(frames)]
        asked = np.arange(site.tokens) if queries is None else np.asarray(queries)
        return np.repeat(rows[asked // area], area, axis=1)[None]

    def traits(self) -> Traits:
        return Traits(
            start=Start("needs tuning", "arXiv:2412.07772"),
            export=("pt2",),
            # an export has at least two chunks: with one there is nothing dynamic about their number
            min_grid=(self.chunk + 1, 1, 1),
            notes="equals full attention while the video is no longer than one chunk and what lies ahead of it",
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(7, 3, 4), rope=rope, qk_norm=True)
        plain = Site(dim=20, heads=2, head_dim=8, grid=Grid(9, 2, 3))
        return [
            (cls(chunk=2, window=2, sinks=1), site),
            (cls(chunk=1, window=2, sinks=2), plain),
            (cls(chunk=3, window=3, sinks=0, ahead=2), plain.at(grid=Grid(8, 3, 2))),
            (cls(), plain.at(grid=Grid(1, 5, 3))),
        ]


class RollingAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D). Owns no parameters."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        if call.extra is not None:
            refuse_segments(self.spec.name, call.extra)
        positions = grid_positions(call.grid, x.device)
        q, k, v = host.heads(*host.project(x, "qkv"), positions)  # (B, N, heads, D)
        frames = call.grid[0]
        q, k, v = (z.unflatten(1, (frames, -1)) for z in (q, k, v))  # (B, T, H*W, heads, D)
        valid = None if call.key_valid is None else call.key_valid.unflatten(1, (frames, -1))
        run = self._by_index if self.traced else self._by_chunk
        y = run(q, k, v, valid, call)  # (B, T, H*W, heads, D)
        out = host.out(y.flatten(1, 2).flatten(2))
        if call.extra is None:
            return out
        return out, self._extra_rows(k, v, valid, call)

    def _by_chunk(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, call: Call) -> Tensor:
        """One call per chunk on slices of frames; nothing is masked that is not invalid."""
        spec: Any = self.spec
        outs = []
        for span in spec.spans(q.shape[1]):
            queries = q[:, span.first : span.last].flatten(1, 2)
            keys, values = _seen(k, span).flatten(1, 2), _seen(v, span).flatten(1, 2)
            mask = None if valid is None else _seen(valid, span).flatten(1)
            y = self._attend(queries, keys, values, mask, call, 1)
            outs.append(y.unflatten(1, (span.last - span.first, -1)))
        return torch.cat(outs, dim=1)

    def _by_index(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, call: Call) -> Tensor:
        """All chunks at once through index arrays, for exporters: the number of frames may be symbolic."""
        spec: Any = self.spec
        batch, frames = q.shape[0], q.shape[1]
        at, seen, real = _indices(spec, frames, q.device)
        count = at.shape[0]
        queries = q[:, at].flatten(0, 1).flatten(1, 2)  # (B*chunks, frames of a chunk * H*W, heads, D)
        keys, values = (z[:, seen].flatten(0, 1).flatten(1, 2) for z in (k, v))
        mask = real[None, :, :, None].expand(batch, count, -1, k.shape[2])
        if valid is not None:
            mask = mask & valid[:, seen]
        y = self._attend(queries, keys, values, mask.flatten(0, 1).flatten(1), call, count)
        y = y.unflatten(0, (batch, count)).unflatten(2, (spec.chunk, -1))  # (B, chunks, frames, H*W, heads, D)
        frame = torch.arange(frames, device=q.device)
        return y[:, frame // spec.chunk, frame % spec.chunk]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, groups: int) -> Tensor:
        """Attention on (B*groups, n, heads, D) with the extra keys behind the grid's; `mask` (B*groups, keys)."""
        spec: Any = self.spec
        if call.extra is not None:
            more_k, more_v = (z.repeat_interleave(groups, dim=0) for z in (call.extra.k, call.extra.v))
            if mask is not None or call.extra.key_mask is not None:
                own = _ones(k) if mask is None else mask
                given = call.extra.key_mask
                more = _ones(more_k) if given is None else given.repeat_interleave(groups, dim=0)
                mask = torch.cat([own, more], dim=1)
            k, v = torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1)
        key_mask = None if mask is None else mask[:, None, None]
        y = attend(*(z.transpose(1, 2) for z in (q, k, v)), key_mask=key_mask, kernel=spec.kernel)
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    def _extra_rows(self, k: Tensor, v: Tensor, valid: Tensor | None, call: Call) -> Tensor:
        """Extra queries see every grid key and every extra key: (B, M, heads*D)."""
        assert call.extra is not None
        mask = None if valid is None else valid.flatten(1)
        return self._attend(call.extra.q, k.flatten(1, 2), v.flatten(1, 2), mask, call, 1).flatten(2)


RollingSpec.module = RollingAttention


def _ones(z: Tensor) -> Tensor:
    return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)


def _seen(z: Tensor, span: Span) -> Tensor:
    """The frames of (B, T, …) that a chunk sees: a view, or a copy where sinks lie apart from the window."""
    near = z[:, span.low : span.high]
    return torch.cat([z[:, : span.sinks], near], dim=1) if span.sinks else near


def _indices(spec: RollingSpec, frames: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Frames of every chunk, frames that it sees, and which of those are real and counted once.

    Returns (chunks, chunk), (chunks, sinks + window + chunk + ahead) and a mask of the latter's shape.
    """
    first = torch.arange((frames + spec.chunk - 1) // spec.chunk, device=device)[:, None] * spec.chunk
    at = (first + torch.arange(spec.chunk, device=device)).clamp(max=frames - 1)
    near = first - spec.window + torch.arange(spec.window + spec.chunk + spec.ahead, device=device)
    sinks = torch.arange(spec.sinks, device=device).expand(first.shape[0], -1)
    seen = torch.cat([sinks, near], dim=1)
    # a sink inside the window is counted there
    real = torch.cat([sinks < first - spec.window, (near >= 0) & (near < frames)], dim=1)
    return at, seen.clamp(0, frames - 1), real
