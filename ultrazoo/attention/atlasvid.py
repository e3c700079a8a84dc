"""Windows of the training extent beside an aligned low-resolution proxy, in one softmax: a reading of AtlasVid.

Of AtlasVid (arXiv 2605.16649) only the abstract is known here: tokens reordered into spatio-temporal windows, asymmetric
global-local attention that injects an aligned proxy of low resolution and frame rate, LoRA trained at 720p, up to 4K. What follows
is **our specification**, not the paper's:

1. Windows: per axis as few as keep to the training extent, as equal as can be; no overlap.
2. The proxy: either the means of cells of the input, or an extra segment with a grid of its own. A query also sees the proxy of
   its window's footprint and `margin` cells around it, in the same softmax.
3. Means are taken of the host's raw keys and values, before norm and rotation: projections are linear, so these are the
   projections of the mean input, without a second matmul. A partial cell is the mean of what it has; invalid tokens do not count.
4. Positions: a proxy cell stands at the middle of its footprint on the high-resolution grid (`proxy_positions`); of a partial
   cell that is the mean place of the tokens it has. A segment comes rotated: its owner has put it there.
5. ``weight: cells`` adds the logarithm of the tokens a cell stands for to its scores, so that it counts as much as they would.
6. Asymmetry: proxy queries of a segment see the proxy alone; means have no queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import Problem, UsageError
from ..grid import AXES, Grid
from ..ops.boxes import Boxes, tile_elements, visited, windowed
from ..ops.graphs import constant_in_graphs
from ..ops.pool import true_means
from ..ops.precision import wide_dtype
from ..spec import AttentionSpec, BranchCost, Cost, Options, Rope, Segment, Site, Start, Traits, option
from .boxed import Job, attend_boxes
from .contract import Attention, Call, Extra, Host, Positions, grid_positions, refuse_segments
from .full import kernel_problems
from .grouped import attend_extra
from .views import NO_EXPORT, joined_valid, plain_grid, product_rows, spread


@dataclass(frozen=True, kw_only=True)
class PooledSpec(Options):
    """The means of cells of the input's keys and values."""

    name: ClassVar[str] = "pooled"

    cell: tuple[int, int, int] = option((2, 4, 4), "tokens (T, H, W) that a proxy cell stands for", ge=1)


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(Options):
    """Extra tokens on a grid of their own: a segment of this kind, with ``rows: pattern`` and ``keys: compete``."""

    name: ClassVar[str] = "segment"

    kind: str = option("proxy", "kind of the segment")

    def of(self, segments: Sequence[Segment]) -> tuple[int, Segment] | None:
        """First token and segment of the proxy; None where there is not exactly one that fits."""
        first, found = 0, []
        for segment in segments:
            if segment.kind == self.kind:
                found.append((first, segment))
            first += segment.length
        if len(found) != 1:
            return None
        grid, segment = found[0][1].grid, found[0][1]
        fits = (
            grid is not None
            and grid.tokens == segment.length
            and (segment.rows, segment.keys) == ("pattern", "compete")
        )
        return found[0] if fits else None

    @property
    def wanted(self) -> str:
        return f"one segment {self.kind!r} with a grid of its length, rows=pattern and keys=compete"


PROXY = {"pooled": PooledSpec, "segment": SegmentSpec}


@dataclass(frozen=True, kw_only=True)
class AtlasvidSpec(AttentionSpec):
    """Windows, and the proxy under and around each."""

    name: ClassVar[str] = "atlasvid"
    source: ClassVar[str] = "after AtlasVid, arXiv 2605.16649 (abstract); the specification is ours"
    formula: ClassVar[str] = "y_i = W_o softmax over [window(i), proxy(i)] of (q_i k_j / sqrt(D) + log w_j) v_j"
    minimal: ClassVar[Mapping[str, Any]] = {"window": [21, 15, 26]}

    window: tuple[int, int, int] | None = option(
        None, "largest window (T, H, W) in tokens; null: the grid that the model was trained at", ge=1
    )
    proxy: PooledSpec | SegmentSpec = option(PooledSpec(), "where the proxy comes from", choices=PROXY)
    margin: int | Literal["full"] = option(1, "proxy cells seen beyond the footprint on every side; full: all", ge=0)
    weight: Literal["none", "cells"] = option("none", "added to a cell's scores: nothing, or the log of its tokens")
    kernel: str = option("auto", "a registered kernel, or auto")

    def extent(self, rope: Rope | None) -> tuple[int, int, int] | None:
        """The largest window; None where nobody gives it."""
        if self.window is not None:
            return self.window
        return None if rope is None or rope.trained is None else tuple(rope.trained)  # type: ignore[return-value]

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel, ("log_weight",) if self.weight == "cells" else ())
        if self.extent(site.rope) is None:
            rule = "the model does not say at which grid it was trained"
            found.append(Problem("window", rule, "give the largest window: [T, H, W] in tokens"))
        if isinstance(self.proxy, SegmentSpec):
            at = self.proxy.of(site.extra)
            if at is None:
                found.append(Problem("proxy", f"needs {self.proxy.wanted}", "or use proxy: pooled"))
            else:
                proxy = at[1].grid
                assert proxy is not None
                for axis, many, length in zip(AXES, proxy, site.grid, strict=True):
                    if many > length:
                        rule = f"the segment has {many} cells along {axis}, the grid {length} tokens"
                        found.append(Problem("proxy", rule, f"a proxy has 1 to {length} there"))
        return found

    def coarse(self, grid: Grid, segments: Sequence[Segment]) -> Grid:
        """The proxy's grid."""
        if isinstance(self.proxy, SegmentSpec):
            at = self.proxy.of(segments)
            assert at is not None and at[1].grid is not None
            return at[1].grid
        t, h, w = (-(-n // f) for n, f in zip(grid, self.proxy.cell, strict=True))
        return Grid(t, h, w)

    def span(self, grid: Grid) -> Grid:
        """The tokens that the proxy's cells cover: past the grid where the last cell is partial."""
        if isinstance(self.proxy, SegmentSpec):
            return grid
        t, h, w = (-(-n // f) * f for n, f in zip(grid, self.proxy.cell, strict=True))
        return Grid(t, h, w)

    def boxes(self, grid: Grid, coarse: Grid, rope: Rope | None) -> Boxes:
        """Windows and the cells of their footprints."""
        extent, margin = self.extent(rope), None if self.margin == "full" else self.margin
        assert extent is not None
        rows = zip(grid, extent, self.span(grid), coarse, strict=True)
        t, h, w = (windowed(n, most, span, cells, margin) for n, most, span, cells in rows)
        return Boxes((grid.t, grid.h, grid.w), (t, h, w), (coarse.t, coarse.h, coarse.w))

    def cost(self, site: Site) -> Cost:
        coarse = self.coarse(site.grid, site.extra)
        segment = coarse.tokens if isinstance(self.proxy, SegmentSpec) else 0
        others, tokens = site.extra_tokens - segment, site.tokens
        # other extra keys are seen by all, their queries see everything; those of the proxy see the proxy
        boxes = self.boxes(site.grid, coarse, site.rope)
        pairs = visited(boxes) + others * (2 * tokens + site.extra_tokens) + segment**2
        attention = 4 * pairs * site.inner
        return Cost(
            pairs=pairs,
            attention_flops=attention,
            qkv_flops=2 * tokens * site.dim * 3 * site.width,
            out_flops=2 * tokens * site.inner * site.dim,
            peak_elements=7 * tokens * site.width + tile_elements(boxes, site.width),
            saved_elements=(7 + 2 * site.qk_norm) * tokens * site.width,
            branches=(BranchCost("windows and proxy", pairs, attention),),
        )

    def _influence(self, site: Site) -> list[np.ndarray]:
        """(L, L) bool per axis: the tokens of the window, and those that its cells are means of."""
        pooled = isinstance(self.proxy, PooledSpec)
        at = self.boxes(site.grid, self.coarse(site.grid, site.extra), site.rope)
        cell = self.proxy.cell if isinstance(self.proxy, PooledSpec) else (1, 1, 1)
        out = []
        for axis, length, factor in zip(at.axes, site.grid, cell, strict=True):
            seen = np.zeros((length, length), dtype=bool)
            for tile in axis:
                for tokens, cells in zip(tile.queries, tile.cells, strict=True):
                    low, end = (cells[0] * factor, (cells[-1] + 1) * factor) if pooled else (tokens[0], tokens[-1] + 1)
                    seen[tokens[0] : tokens[-1] + 1, low:end] = True
            out.append(seen)
        return out

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        return product_rows(self._influence(site), site.grid, queries)[None]

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return spread(self._influence(site), tokens, site.grid)

    def traits(self) -> Traits:
        start = Start(
            "needs tuning", "arXiv 2605.16649: LoRA trained at 720p; this specification is ours and untrained"
        )
        return Traits(start=start, export=(), notes=NO_EXPORT)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2), trained=Grid(2, 3, 4))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True)
        two = PooledSpec(cell=(2, 2, 2))
        return [
            (cls(proxy=two, margin=0, weight="cells"), site.at(extra=(Segment("text", 4),))),
            (cls(window=(2, 4, 5), proxy=PooledSpec(cell=(1, 3, 2))), site.at(rope=None)),
            (cls(window=(4, 2, 2), proxy=two, margin="full"), site.at(grid=Grid(1, 4, 5), has_timestep=False)),
        ]


class AtlasvidAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    @constant_in_graphs
    def plan(self, t: int, h: int, w: int, pt: int, ph: int, pw: int) -> Boxes:
        """The boxes at a grid, with a proxy of the second grid."""
        spec: Any = self.spec
        found: Boxes = spec.boxes(Grid(t, h, w), Grid(pt, ph, pw), self.site.rope)
        return found

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        t, h, w = plain_grid(call.grid)
        extra, proxy = _split(spec, call.extra)
        raw_q, raw_k, raw_v = host.project(x, "qkv")
        q, k, v = host.heads(raw_q, raw_k, raw_v, grid_positions((t, h, w), x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        if proxy is None:
            pt, ph, pw = spec.coarse(Grid(t, h, w), ())
            far_k, far_v, far_valid, tokens = self._means(raw_k, raw_v, host, call, (t, h, w))
        else:
            pt, ph, pw = spec.coarse(Grid(t, h, w), call.extra.segments if call.extra is not None else ())
            far_k, far_v, far_valid = proxy.k, proxy.v, proxy.key_mask
            tokens = x.new_full((1, far_k.shape[1]), t * h * w / far_k.shape[1], dtype=wide_dtype(x.dtype))
        # nothing reads the raw projections any more
        del raw_q, raw_k, raw_v
        keys, values = [k, far_k], [v, far_v]
        valid = joined_valid(x, call.key_valid, far_valid, far_k.shape[1])
        always = 0
        if extra is not None:
            always = extra.k.shape[1]
            valid = joined_valid(torch.cat([k, far_k], dim=1), valid, extra.key_mask, always)
            keys, values = [*keys, extra.k], [*values, extra.v]
        log_weight = None
        if spec.weight == "cells":
            near, rest = tokens.new_zeros(x.shape[0], k.shape[1]), tokens.new_zeros(x.shape[0], always)
            log_weight = torch.cat([near, tokens.log().expand(x.shape[0], -1), rest], dim=1)
        job = Job(self.plan(t, h, w, pt, ph, pw), always, valid, log_weight, kernel=spec.kernel)
        y = host.out(attend_boxes(q, torch.cat(keys, dim=1), torch.cat(values, dim=1), job).flatten(2))
        if call.extra is None:
            return y
        return y, self._extra_rows(call.extra, extra, proxy, k, v, call.key_valid)

    def _means(
        self, raw_k: Tensor, raw_v: Tensor, host: Host, call: Call, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Keys and values (B, P, heads, D) of the cells, which of them hold a real token, and how many each holds."""
        cell = self.spec.proxy.cell  # type: ignore[attr-defined]
        valid = None if call.key_valid is None else call.key_valid.unflatten(1, grid)
        (k, tokens), (v, _) = (true_means(z.unflatten(1, grid), cell, valid) for z in (raw_k, raw_v))
        at = proxy_positions(grid, k.shape[1:4], self.spec.span(Grid(*grid)), raw_k.device)  # type: ignore[attr-defined]
        _, k, v = host.heads(None, k.flatten(1, 3), v.flatten(1, 3), at)  # type: ignore[assignment]
        tokens = tokens.flatten(1)
        return k, v, None if valid is None else tokens > 0, tokens.clamp(min=1)

    def _extra_rows(
        self, given: Extra, others: Extra | None, proxy: Extra | None, k: Tensor, v: Tensor, valid: Tensor | None
    ) -> Tensor:
        """What extra queries get, in the order given: those of the proxy see it alone, others see everything."""
        kernel = self.spec.kernel  # type: ignore[attr-defined]
        if proxy is None:
            return attend_extra(given, k, v, valid, kernel)
        rows = [attend_extra(proxy, k[:, :0], v[:, :0], None, kernel)]
        first, _ = self.spec.proxy.of(given.segments)  # type: ignore[attr-defined]
        if others is not None:
            dense = attend_extra(replace(given, q=others.q), k, v, valid, kernel)
            rows = [dense[:, :first], *rows, dense[:, first:]]
        return torch.cat(rows, dim=1)


def proxy_positions(
    grid: Sequence[int],
    proxy: Sequence[int],
    span: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Positions:
    """Where the cells of a `proxy` grid stand on the `grid`: the middle of what each covers, at fractional coordinates.

    Whoever owns a proxy segment rotates its queries and keys at these. `span` is what the cells cover, beyond the grid where
    the last cell of an axis is partial; None means the grid.
    """
    places = []
    for length, cells, covered in zip(grid, proxy, grid if span is None else span, strict=True):
        # token i lies between i - 1/2 and i + 1/2
        edges = (torch.arange(cells + 1, device=device, dtype=torch.float32) * covered / cells).clamp(max=length)
        places.append((edges[:-1] + edges[1:] - 1) / 2)
    t, h, w = places
    return Positions(t, h, w)


def _split(spec: AtlasvidSpec, extra: Extra | None) -> tuple[Extra | None, Extra | None]:
    """Extra tokens that all see, and those of the proxy where it is a segment. Raises UsageError where it is missing."""
    if isinstance(spec.proxy, PooledSpec):
        if extra is not None:
            refuse_segments(spec.name, extra)
        return extra, None
    at = None if extra is None else spec.proxy.of(extra.segments)
    if extra is None or at is None:
        raise UsageError(f"attention {spec.name!r} needs {spec.proxy.wanted} in every call; or use proxy: pooled")
    first, segment = at
    end = first + segment.length
    rest = tuple(one for one in extra.segments if one is not segment)
    proxy = _rows(extra, slice(first, end), (segment,))
    if not rest:
        return None, proxy
    keep = torch.cat([torch.arange(first), torch.arange(end, extra.k.shape[1])]).to(extra.k.device)
    others = _rows(extra, keep, rest)
    refuse_segments(spec.name, others)
    return others, proxy


def _rows(extra: Extra, rows: Any, segments: tuple[Segment, ...]) -> Extra:
    mask = None if extra.key_mask is None else extra.key_mask[:, rows]
    return Extra(extra.q[:, rows], extra.k[:, rows], extra.v[:, rows], mask, segments)


AtlasvidSpec.module = AtlasvidAttention

__all__ = ["AtlasvidAttention", "AtlasvidSpec", "PooledSpec", "SegmentSpec", "proxy_positions"]
