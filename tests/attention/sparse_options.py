"""Random legal settings of block-sparse attention: orders, selectors, far fields, segments, sizes."""

from __future__ import annotations

import random

from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.budgets import BudgetSpec
from ultrazoo.attention.parts.cached import CachedSpec
from ultrazoo.attention.parts.far import CoarseSpec, DropSpec, FarSpec, MeanSpec
from ultrazoo.attention.parts.frames import FramesSpec
from ultrazoo.attention.parts.orders import ColumnsSpec, CurveSpec, OrderSpec, RasterSpec, TilesSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.ranges import TokensSpec
from ultrazoo.attention.parts.rules import MeanStdSpec, RuleSpec, TopKOrPSpec, TopKSpec, TopPSpec
from ultrazoo.attention.parts.selectors import AllSpec, BandSpec, SelectorSpec, SinkSpec, UnionSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Segment, Site


def rule(draw: random.Random) -> RuleSpec:
    name = draw.choice(["share", "count", "topp", "either", "std"])
    if name == "share":
        return TopKSpec(
            share=draw.choice([0.1, 0.3, 0.5, 0.7, 1.0]),
            multiple=draw.choice([1, 1, 2, 3]),
            least=draw.choice([1, 1, 2, 4]),
            rounding=draw.choice(["up", "down"]),
            competing=draw.choice(["counted", "added"]),
        )
    if name == "count":
        return TopKSpec(count=draw.choice([1, 2, 3]), multiple=draw.choice([1, 2]), least=draw.choice([1, 2]))
    if name == "topp":
        return TopPSpec(p=draw.choice([0.2, 0.5, 0.9, 1.0]), floor=draw.choice([0.0, 0.3]))
    if name == "either":
        return TopKOrPSpec(share=draw.choice([0.1, 0.4]), p=draw.choice([0.2, 0.6]))
    # of two scores the lower is the mean less one deviation, so that rounding would decide at tau = 1
    return MeanStdSpec(tau=draw.choice([0.0, 0.3, 0.9, -0.9, None]), moments=draw.choice(["diag", "exact"]))


def pooled(draw: random.Random) -> PooledSpec:
    runs = draw.choice([(1, 1), (1, 1), (2, 2), (4, 1), (1, 3), (3, 2)])
    return PooledSpec(
        rule=rule(draw),
        runs=runs,
        normalise=draw.choice(["none", "row"]) if runs[0] > 1 else "none",
        key_bias=draw.choice(["none", "none", "log_variance", "log_norm"]),
        centre=draw.random() < 0.4,
        project=draw.random() < 0.3,
    )


def selector(draw: random.Random, depth: int = 0) -> SelectorSpec:
    names = ["pooled"] * 4 + ["all", "band", "sink", "tokens", "frames", "budget"] + ["union", "cached"] * 2
    name = draw.choice(names) if depth < 2 else "pooled"
    if name == "all":
        return AllSpec()
    if name == "band":
        return BandSpec(width=draw.choice([0, 1, 2]))
    if name == "sink":
        return SinkSpec(frames=draw.choice([1, 2, 9]))
    if name == "frames":
        return FramesSpec(chunk=draw.choice([1, 2]), radius=draw.choice([0, 1]), anchors=draw.choice(["both", "none"]))
    if name == "tokens":
        return TokensSpec(start=draw.choice([0, 1]), count=draw.choice([1, 2]))
    if name == "union":
        return UnionSpec(of=tuple(selector(draw, depth + 1) for _ in range(draw.choice([1, 2, 3]))))
    if name == "cached":
        return CachedSpec(of=selector(draw, depth + 1), drift=draw.choice([None, 1.0]))
    if name == "budget":
        heads = tuple(draw.choice([0.1, 0.5, 1.0]) for _ in range(3))
        share = PooledSpec(rule=draw.choice([TopKSpec(share=0.3), TopKOrPSpec(), TopPSpec(p=0.3, floor=0.2)]))
        inner = draw.choice([share, CachedSpec(of=share), UnionSpec(of=(share, selector(draw, depth + 1)))])
        return BudgetSpec(of=inner, heads=heads)
    return pooled(draw)


def order(draw: random.Random) -> OrderSpec:
    block = draw.choice([1, 2, 4, 5, 8, (8, 4), (3, 5), (4, 8), 128])
    name = draw.choice(["raster", "columns", "hilbert", "morton", "tiles"])
    if name == "raster":
        return RasterSpec(block=block)
    if name == "columns":
        return ColumnsSpec(block=block)
    if name == "tiles":
        tile = tuple(draw.choice([1, 2, 3, 4]) for _ in range(3))
        return TilesSpec(tile=tile, image_tile=draw.choice([None, (1, 2, 3)]))
    return CurveSpec(block=block, curve="hilbert" if name == "hilbert" else "morton")


def far_field(draw: random.Random) -> FarSpec:
    coarse = CoarseSpec(gate=draw.choice(["linear", "sigmoid", "none"]))
    return draw.choice([DropSpec(), MeanSpec(), MeanSpec(order=1), coarse])


def segment(draw: random.Random) -> Segment:
    rows, keys = draw.choice(["dense", "pattern"]), draw.choice(["always", "compete"])
    kind, length = draw.choice(["text", "reference"]), draw.choice([1, 3, 5, 9, 12])
    grid = draw.choice([None, Grid(2, 2, 3), Grid(1, 3, 4)]) if length == 12 else None
    return Segment(kind, length, grid, rows, keys)


def setting(draw: random.Random) -> tuple[BlockSparseSpec, Site]:
    """A spec and a site that go together: three heads of 8, at most 96 tokens."""
    while True:
        site = Site(
            dim=20,
            heads=3,
            head_dim=8,
            grid=Grid(draw.choice([1, 1, 2, 3]), draw.randint(1, 6), draw.randint(1, 5)),
            extra=tuple(segment(draw) for _ in range(draw.choice([0, 1, 2, 3]))),
            qk_norm=draw.random() < 0.5,
            rope=draw.choice([None, Rope(axes=(4, 2, 2))]),
        )
        spec = BlockSparseSpec(
            order=order(draw),
            selector=selector(draw),
            far=far_field(draw),
            extra_rows=draw.choice(["host", "host", "dense", "pattern", "videos"]),
            extra_keys=draw.choice(["host", "host", "always", "compete"]),
        )
        if not spec.problems(site):
            return spec, site
