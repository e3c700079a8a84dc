"""Block-sparse attention: tokens in an order, cut into blocks; a selector chooses key blocks for every query block, and a
far field says what the other blocks give.

``y_i = softmax over keys of selected blocks (+ far field)``. STA (arXiv 2502.04507), Radial (2506.19852), VSA (2505.13389),
SLA (2509.24006), Sol-Attn (2607.24027), PISA (2602.01077), VMoBA, NABLA and Sparse VideoGen are settings of it. Maps are
made for some query blocks at a time, so nothing is quadratic in tokens; blocks are exact at every size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import Problem, SiteError
from ..grid import Grid
from ..kernels import attend
from ..kernels.block_map import BlockMap
from ..ops.graphs import outside_graphs
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Segment, Site, Start, Traits, option
from .checks import same_dtype
from .contract import Attention, Call, Host, grid_positions
from .full import kernel_problems
from .grouped import attend_extra
from .parts.by_query import ByQuerySpec
from .parts.far import CoarseSpec, DropSpec, FarSpec, far_output, far_problems
from .parts.orders import ORDERS, ColumnsSpec, OrderSpec, Place, RasterSpec, TilesSpec, ruled
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec, TopPSpec
from .parts.scene import Scene, checked, ordered, ordered_tokens, restored
from .parts.selectors import (
    AllSpec,
    BandSpec,
    Bounds,
    SelectorSpec,
    SinkSpec,
    UnionSpec,
    chunks_of,
    nested,
    selector_problems,
)
from .parts.soft import SoftMap, soft_near


@dataclass(frozen=True, kw_only=True)
class BlockSparseSpec(AttentionSpec):
    """An order of blocks, a selector and a far field."""

    name: ClassVar[str] = "block_sparse"
    source: ClassVar[str] = "VSA, arXiv 2505.13389; Sol-Attn, arXiv 2607.24027; Radial, arXiv 2506.19852"
    formula: ClassVar[str] = (
        "y_i = W_o [ sum_{j in M(i)} softmax(q_i k_j / sqrt(D)) v_j (+ far field of blocks not in M(i)) ]"
    )

    order: OrderSpec = option(
        RasterSpec(), "the order of tokens and their blocks", choices={**ORDERS, ByQuerySpec.name: ByQuerySpec}
    )
    selector: SelectorSpec = option(PooledSpec(), "which key blocks a query block visits", kind="selector")
    far: FarSpec = option(DropSpec(), "what the other key blocks give", kind="far_field")
    extra_rows: Literal["host", "dense", "pattern", "videos"] = option(
        "host",
        "rows of extra tokens see everything or what the pattern gives them, as their segment says or all alike; videos: "
        "those of more than one frame follow it",
    )
    extra_keys: Literal["host", "always", "compete"] = option(
        "host", "keys of extra tokens are seen by all or chosen like others, as their segment says or all alike"
    )
    kernel: str = option("auto", "a registered kernel that takes block maps, or auto")

    def place(self, site: Site) -> Place:
        """Blocks of the site's grid and extra tokens."""
        return _place(self.order, site.grid, self.segments(site.extra))

    def segments(self, given: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Segments of extra tokens with the policies that this gives them."""
        return tuple(ruled(one, self.extra_rows, self.extra_keys) for one in given)

    def problems(self, site: Site) -> list[Problem]:
        site = site.at(extra=self.segments(site.extra))
        found = [problem.under("order") for problem in self.order.problems(site)]
        found += [problem.under("selector") for problem in self.selector.problems(site)]
        found += [problem.under("far") for problem in self.far.problems(site)] or far_problems(self.far)
        if found:
            return found + kernel_problems(self.kernel)
        inside = list(nested(self.selector))
        needs_grid = any(one.needs_grid for one in inside)
        for segment in site.extra:
            if needs_grid and (segment.rows == "pattern" or segment.keys == "compete"):
                rule = f"selects by place, and segment {segment.kind!r} has none (rows {segment.rows}, keys {segment.keys})"
                found.append(
                    Problem(
                        "selector",
                        rule,
                        "use rows: dense and keys: always for it (extra_rows, extra_keys), or a pooled selector",
                    )
                )
        if self.selector.softness is None and any(one.softness is not None for one in inside):
            found.append(
                Problem("selector", "a soft rule stands alone", "name the pooled selector itself, without others")
            )
        if self.selector.softness is not None and not self.far.takes_soft:
            found.append(
                Problem("far", f"{self.far.name!r} wants a choice, and the rule is soft", "use drop or linear")
            )
        if getattr(self.far, "skip", 0) and (self.selector.softness is not None or self.selector.name != "pooled"):
            rule = "skips by the scores of a pooled selector that chooses"
            found.append(Problem("far.skip", rule, "use 0, or selector pooled with a rule that chooses"))
        if found:
            return found
        place = self.place(site)
        found = self.selector.place_problems(place, site) or selector_problems(self.selector, place, site)
        if not found and self.selects and not (self.far.alone or place.always_tokens or self._chosen(site).least):
            rule = f"may choose nothing for a query, which far {self.far.name!r} leaves without an answer"
            found = [
                Problem("", rule, "unite it with a band: {name: union, of: [the selector, band]}, or use far: mean")
            ]
        return self._kernel_problems(site) + [problem.under("selector") for problem in found]

    def _kernel_problems(self, site: Site) -> list[Problem]:
        if self.kernel == "auto":
            return []
        if self.selector.softness is not None:
            rule = f"{self.kernel!r} would never be asked: a soft rule weighs every pair in plain arithmetic"
            return [Problem("kernel", rule, "use auto, or a rule that chooses")]
        place = self.place(site)
        return kernel_problems(
            self.kernel, ("block_map", "lse") if self.far.wants_lse else ("block_map",), place.queries, place.keys
        )

    # --- what it costs ----------------------------------------------------------------------------------------------

    def bounds(self, site: Site) -> Bounds:
        """Pairs per head: fewest, expected, most; without those of extra rows that see everything."""
        site = site.at(extra=self.segments(site.extra))
        place, found = self.place(site), self._chosen(site)
        fixed = place.queries.tokens * place.always_tokens + self.far.pairs(place)
        return Bounds(*(value + fixed for value in found))

    def _chosen(self, site: Site) -> Bounds:
        """Pairs per head with blocks that the selector chooses."""
        return _bounds(self.selector, self.order, site if self.selector.by_layer else site.at(layer=0))

    def cost(self, site: Site) -> Cost:
        site = site.at(extra=self.segments(site.extra))
        place, tokens = self.place(site), site.tokens
        dense = sum(segment.length for segment in site.extra if segment.rows == "dense")
        dense_pairs = dense * (tokens + site.extra_tokens)
        least, expected, most = (value + dense_pairs for value in self.bounds(site))
        attention = 4 * expected * site.inner
        qkv = 2 * tokens * site.dim * 3 * site.width
        other = self.selector.flops(place, site) + self.far.flops(place, site)
        owned = self.selector.parameters(site) + self.far.parameters(site)
        return Cost(
            pairs=expected,
            attention_flops=attention,
            qkv_flops=qkv,
            out_flops=2 * tokens * site.inner * site.dim,
            other_flops=other,
            parameters=owned,
            visited_pairs=self._visited(place, expected, dense_pairs),
            pairs_min=least if self.selects else None,
            pairs_max=most if self.selects else None,
            # q, k, v as projected, in block order and cut into blocks; single queries have sums in fp32 besides
            peak_elements=(14 if place.queries.largest == 1 else 9) * tokens * site.width + self.far.elements(site),
            saved_elements=(9 + 2 * site.qk_norm) * tokens * site.width + tokens * site.heads,
            kept_bytes=self.selector.kept_bytes(place, site),
            branches=(BranchCost("blocks", expected, attention, qkv, other, owned),),
        )

    def _visited(self, place: Place, pairs: int, dense_pairs: int) -> int | None:
        """Pairs with those of slots that no token fills: blocks are cut to the size of the largest, but for single queries."""
        if place.queries.largest == 1:
            return None
        apart = self.far.pairs(place) + dense_pairs
        queries, keys = (z.count * z.largest / z.tokens for z in (place.queries, place.keys))
        return apart + round((pairs - apart) * queries * keys)

    @property
    def selects(self) -> bool:
        return not self.selector.is_static

    # --- what it sees -----------------------------------------------------------------------------------------------

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        place = self.place(site.at(extra=()))
        wanted = np.arange(site.tokens) if queries is None else np.asarray(queries, dtype=int)
        if self.selects or self.far.reads_all:
            return np.ones((1, len(wanted), site.tokens), dtype=bool)
        order = np.arange(site.tokens) if place.order is None else place.order
        at = np.empty(site.tokens, dtype=int)
        at[order] = np.arange(site.tokens)
        block = np.searchsorted(np.asarray(place.queries.starts), at[wanted], side="right") - 1
        rows = [self.selector.map(place, site.at(extra=()), b, b + 1)[:, 0] for b in np.unique(block)]
        maps = np.stack(rows, axis=1)[:, np.searchsorted(np.unique(block), block)]
        seen = np.repeat(maps, place.keys.sizes, axis=-1)[:, :, at]
        # a token always depends on itself: it is its own query
        seen[:, np.arange(len(wanted)), wanted] = True
        return seen

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        if self.selects or self.far.reads_all:
            return np.broadcast_to(tokens.any(axis=1, keepdims=True), tokens.shape)
        place = self.place(site.at(extra=()))
        order = np.arange(site.tokens) if place.order is None else place.order
        held = np.logical_or.reduceat(tokens[:, order], np.asarray(place.queries.starts[:-1]), axis=1)
        rows = _map(self.selector, self.order, site.at(extra=(), layer=site.layer if self.selector.by_layer else 0))
        keys = np.stack([np.bitwise_or.reduce(rows[one], axis=0) for one in held])
        keys = np.unpackbits(keys, axis=1, count=place.keys.count).astype(bool)
        seen = tokens.copy()
        seen[:, order] |= np.repeat(keys, place.keys.sizes, axis=1)
        return seen

    def traits(self) -> Traits:
        learned = self.far.learned or self.selector.parameters(Site(dim=8, heads=1, head_dim=8)) > 0
        exact = self.selector.keeps_all() and self.far.exact_with_all()
        whole = self.far.reads_all or not self.selects
        start = Start("training-free", "selects by the data; dense first steps advised (`steps`)")
        if exact:
            start = Start("exact", "every block is selected")
        elif learned:
            start = Start("needs tuning", "owns parameters that start neutral")
        elif not self.selects:
            start = Start("needs tuning", "changes what tokens see")
        return Traits(
            start=start,
            exact_at_init=exact,
            export=(),
            visible="exact" if whole and not self.far.may_skip else "upper bound",
            min_grid=(1, 1, 1),
            selects=self.selects,
            fullgraph=False,
            frozen=tuple(f"selector.{name}" for name in self.selector.frozen()),
            notes="lists of blocks are data: no graph with dynamic sizes holds them",
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        return list(_examples(cls))


@lru_cache(maxsize=64)
def _place(order: OrderSpec, grid: Grid, segments: tuple[Segment, ...]) -> Place:
    return order.place(grid).with_segments(segments, order.segment_block)


@lru_cache(maxsize=64)
def _problems(spec: BlockSparseSpec, site: Site) -> tuple[Problem, ...]:
    return tuple(spec.problems(site))


@lru_cache(maxsize=256)
def _bounds(selector: SelectorSpec, order: OrderSpec, site: Site) -> Bounds:
    return selector.bounds(_place(order, site.grid, site.extra), site)


@lru_cache(maxsize=2)
def _map(selector: SelectorSpec, order: OrderSpec, site: Site) -> np.ndarray:
    """A static map of any head, packed: uint8 (query blocks, key blocks / 8); 19 MB for 12 240 blocks."""
    place = _place(order, site.grid, site.extra)
    chunks = chunks_of(place, site.heads)
    return np.concatenate([np.packbits(selector.map(place, site, lo, hi).any(axis=0), axis=1) for lo, hi in chunks])


def _examples(cls: type[BlockSparseSpec]) -> Iterator[tuple[AttentionSpec, Site]]:
    rope = Rope(axes=(4, 2, 2))
    site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True, layer=1, layers=2)
    tiles = TilesSpec(tile=(2, 2, 3))
    forced = UnionSpec(of=(PooledSpec(rule=TopPSpec(p=0.4)), BandSpec(width=1), SinkSpec(frames=1)))
    top = PooledSpec(rule=TopKSpec(share=0.3))
    yield cls(order=RasterSpec(block=(8, 4)), selector=top), site.at(extra=(Segment("text", 5),))
    yield cls(order=tiles, selector=PooledSpec(rule=TopKSpec(count=4)), far=CoarseSpec()), site
    yield cls(order=ColumnsSpec(block=6), selector=forced), site.at(rope=None, qk_norm=False)
    yield cls(order=tiles, selector=AllSpec(), far=CoarseSpec()), site.at(grid=Grid(1, 4, 5), has_timestep=False)


class BlockSparseAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: BlockSparseSpec, site: Site):
        super().__init__(spec, site)
        self.selector = spec.selector.build(site)
        self.far = spec.far.build(site)

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))  # (B, N, heads, D)
        assert q is not None and k is not None and v is not None
        # autocast leaves norms in fp32 and projections in 16 bits, and would take scores and sums to 16 bits
        if torch.is_autocast_enabled(x.device.type) and not q.dtype == k.dtype == v.dtype:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            y, pattern = self._attend(x, q, k, v, call)
        out = host.out(y.flatten(2))
        if call.extra is None:
            return out
        return out, self._extra_rows(call, k, v, pattern)

    def _extra_rows(self, call: Call, k: Tensor, v: Tensor, pattern: Tensor) -> Tensor:
        """Rows (B, M, heads*D) of extra tokens: dense ones, and those that follow the pattern in their place."""
        extra = call.extra
        assert extra is not None
        if not pattern.shape[2]:
            return attend_extra(extra, k, v, call.key_valid, "auto")
        follows = [segment.rows == "pattern" for segment in self._segments(call) for _ in range(segment.length)]
        of_pattern = torch.tensor(follows, device=k.device)
        rows = pattern.new_empty(pattern.shape[0], len(follows), pattern.shape[1] * pattern.shape[3])
        rows = rows.index_copy(1, of_pattern.nonzero()[:, 0], pattern.transpose(1, 2).flatten(2))
        dense = (~of_pattern).nonzero()[:, 0]
        if not dense.numel():
            return rows
        found = attend_extra(replace(extra, q=extra.q.index_select(1, dense)), k, v, call.key_valid, "auto")
        return rows.index_copy(1, dense, found.to(rows.dtype))

    def _segments(self, call: Call) -> tuple[Segment, ...]:
        assert call.extra is not None
        spec: Any = self.spec
        found: tuple[Segment, ...] = spec.segments(call.extra.segments or (Segment("extra", call.extra.k.shape[1]),))
        return found

    # lists of blocks are data: a compiler goes around them
    @outside_graphs
    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Grid rows (B, N, heads, D) in the grid's order, and rows of extra tokens that follow the pattern."""
        spec: Any = self.spec
        segments = () if call.extra is None else self._segments(call)
        # what a call brings, policies of extra tokens above all, was seen by no check before
        if problems := _problems(spec, self.site.at(grid=Grid(*call.grid), extra=segments)):
            raise SiteError(f"attention {spec.name!r} at grid {Grid(*call.grid)}", problems)
        place = _place(spec.order, Grid(*call.grid), segments)
        scene = self._scene(x, q, k, v, call, place)
        mask = None if scene.key_valid is None else scene.key_valid[:, None, None]
        block_map: BlockMap | SoftMap
        if spec.selector.softness is None:
            block_map = self._map(scene)
            near, lse = self._near(scene, block_map, mask)
        else:
            block_map = self.selector.soft(scene)
            near, lse = soft_near(scene, block_map, mask), None
        y = far_output(spec.far, self.far(scene, block_map, near, lse), near)  # (B, heads, queries, D)
        return restored(y[:, :, : x.shape[1]], place), y[:, :, x.shape[1] :]

    def _near(self, scene: Scene, block_map: BlockMap, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spec: Any = self.spec
        common: dict[str, Any] = {"key_mask": mask, "block_map": block_map, "kernel": spec.kernel}
        if spec.far.wants_lse:
            out, lse = attend(scene.q, scene.k, scene.v, return_lse=True, **common)
            return out, lse
        found = attend(scene.q, scene.k, scene.v, **common)
        assert isinstance(found, Tensor)
        return found, None

    def _scene(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call, place: Place) -> Scene:
        """Everything in block order, extra tokens behind the grid's."""
        q, k, v = (ordered(z, place) for z in (q, k, v))
        valid = None if call.key_valid is None else ordered_tokens(call.key_valid, place)
        query_valid = valid
        extra = call.extra
        if extra is not None:
            same_dtype(extra, k)
            keys = torch.tensor(place.key_rows, device=x.device, dtype=torch.long)
            rows = torch.tensor(place.query_rows, device=x.device, dtype=torch.long)
            q = torch.cat([q, extra.q.transpose(1, 2).index_select(2, rows)], dim=2)
            k = torch.cat([k, extra.k.transpose(1, 2).index_select(2, keys)], dim=2)
            v = torch.cat([v, extra.v.transpose(1, 2).index_select(2, keys)], dim=2)
            if valid is not None or extra.key_mask is not None:
                grid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
                more = (
                    torch.ones_like(extra.k[..., 0, 0], dtype=torch.bool) if extra.key_mask is None else extra.key_mask
                )
                valid = torch.cat([grid, more.index_select(1, keys)], dim=1)
                query_valid = torch.cat([grid, more.index_select(1, rows)], dim=1)
        site = self.site
        found = Scene(place, q, k, v, x, valid, site.layer, site.layers, call.step, call.branch, call.state)
        found.query_valid = query_valid
        return found

    def _map(self, scene: Scene) -> BlockMap:
        place = scene.place
        batch, heads = scene.q.shape[:2]
        spec: Any = self.spec
        choose = checked(spec.selector.name, self.selector(scene), scene)
        always = place.keys.count - place.selectable

        def rows(lo: int, hi: int) -> Tensor:
            found = choose(lo, hi)
            if not always:
                return found
            return torch.cat([found, found.new_ones(*found.shape[:3], always)], dim=-1)

        return BlockMap(place.queries, place.keys, rows, batch, heads, scene.q.device)


BlockSparseSpec.module = BlockSparseAttention
