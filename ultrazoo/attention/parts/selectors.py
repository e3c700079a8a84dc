"""Selectors: which key blocks each query block visits.

Static selectors are maps known from sizes alone, made row by row by arithmetic; dynamic ones look at the data. Every query
block sees at least what its selector chose; extra tokens that all see are added outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import Problem
from ...ops.init import Identity, marked
from ...spec import Site, Spec, option
from .orders import Place
from .rules import RULES, RuleSpec, TopKSpec
from .scene import Rows, Scene, in_steps
from .soft import SoftMap, soft_map
from .states import log_norms, log_variances

CHUNK = 1 << 22
"""Entries of a static map made at a time."""


class Bounds(NamedTuple):
    """Query-key pairs per head over the grid and pattern rows: fewest, expected, most."""

    least: int
    expected: int
    most: int


@dataclass(frozen=True, kw_only=True)
class SelectorSpec(Spec):
    """Chooses key blocks for query blocks. `static`: from sizes alone. `needs_grid`: has no answer for extra tokens."""

    kind: ClassVar[str] = "selector"
    static: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    @property
    def is_static(self) -> bool:
        return self.static

    @property
    def by_layer(self) -> bool:
        """Does the map depend on the layer?"""
        return False

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        """What is wrong at this size and order."""
        return []

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        """Static selectors: bool (1 | heads, hi - lo, selectable blocks) of query blocks lo..hi."""
        raise TypeError(f"{type(self).__name__} has no map")

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        """Pairs per head with the selectable blocks."""
        assert self.is_static, f"{type(self).__name__} does not say how much it keeps"
        total = static_pairs(self, place, site)
        return Bounds(total, total, total)

    def flops(self, place: Place, site: Site) -> int:
        """FLOPs of scoring, per layer."""
        return 0

    def parameters(self, site: Site) -> int:
        return 0

    def kept_bytes(self, place: Place, site: Site) -> int:
        """Bytes of maps that stay in the call's state between steps: batch 1, one guidance branch."""
        return 0

    def keeps_all(self) -> bool:
        """Does it keep every block, whatever the data?"""
        return False

    def frozen(self) -> tuple[str, ...]:
        """Own parameters that are used and not trained, by name."""
        return ()

    @property
    def softness(self) -> float | None:
        """Temperature of a selector that weighs every block, with gradients; None where it chooses."""
        return None

    def build(self, site: Site) -> nn.Module:
        """``module(scene)`` → rows (see `scene.Rows`)."""
        return _Static(self, site)


def chunks_of(place: Place, heads: int) -> list[tuple[int, int]]:
    """Ranges of query blocks whose map is of bounded size."""
    step = max(1, CHUNK // max(1, heads * place.selectable))
    return [(lo, min(lo + step, place.queries.count)) for lo in range(0, place.queries.count, step)]


def static_pairs(spec: SelectorSpec, place: Place, site: Site) -> int:
    """Pairs per head of a static map, rounded to whole pairs where heads differ."""
    keys = place.keys.sizes[: place.selectable].astype(np.float64)
    total = 0.0
    for lo, hi in chunks_of(place, site.heads):
        found = spec.map(place, site, lo, hi)
        total += float(((found @ keys) * place.queries.sizes[lo:hi]).sum()) / found.shape[0]
    return round(total)


class _Static(nn.Module):
    """A map that needs no data."""

    def __init__(self, spec: SelectorSpec, site: Site):
        super().__init__()
        self.spec, self.site = spec, site

    def forward(self, scene: Scene) -> Rows:
        place, site = scene.place, self.site.at(grid=scene.place.grid)

        def rows(lo: int, hi: int) -> Tensor:
            # a copy: maps may be views that nobody may write to
            found = torch.from_numpy(np.array(self.spec.map(place, site, lo, hi)))
            return found.unsqueeze(0).to(scene.q.device)

        return rows


@dataclass(frozen=True, kw_only=True)
class AllSpec(SelectorSpec):
    """Every block: full attention."""

    name: ClassVar[str] = "all"
    static: ClassVar[bool] = True

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        return np.ones((1, hi - lo, place.selectable), dtype=bool)

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        total = place.queries.tokens * place.keys.starts[place.selectable]
        return Bounds(total, total, total)

    def keeps_all(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class BandSpec(SelectorSpec):
    """Key blocks within `width` blocks of the query block, in the order of tokens; 0 is the own block."""

    name: ClassVar[str] = "band"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    width: int = option(1, "blocks to either side", ge=0)

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        first, end = self._near(place, lo, hi)
        at = np.arange(place.selectable)
        return ((at >= first[:, None]) & (at < end[:, None]))[None]

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        first, end = self._near(place, 0, place.queries.count)
        starts = np.asarray(place.keys.starts)
        total = int(place.queries.sizes @ (starts[end] - starts[first]))
        return Bounds(total, total, total)

    def _near(self, place: Place, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """First key block and end for query blocks lo..hi.

        Blocks of queries and keys may differ in size: a key block is near if any of its tokens' blocks is.
        """
        starts, at = np.asarray(place.queries.starts), np.arange(lo, hi)
        first = starts[np.maximum(at - self.width, 0)]
        end = starts[np.minimum(at + self.width + 1, place.queries.count)]
        keys = np.asarray(place.keys.starts[: place.selectable + 1])
        return np.searchsorted(keys[1:], first, side="right"), np.searchsorted(keys[:-1], end, side="left")


@dataclass(frozen=True, kw_only=True)
class SinkSpec(SelectorSpec):
    """Key blocks that hold a token of the first frames, for every query block."""

    name: ClassVar[str] = "sink"
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    frames: int = option(1, "first frames that all see", ge=1)

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        grid = place.grid
        in_sink = np.arange(grid.tokens) < min(self.frames, grid.t) * grid.h * grid.w
        if place.order is not None:
            in_sink = in_sink[place.order]
        starts = np.asarray(place.keys.starts[: place.selectable])
        holds = np.logical_or.reduceat(in_sink, starts)
        return np.broadcast_to(holds[None, None], (1, hi - lo, place.selectable))


@dataclass(frozen=True, kw_only=True)
class PooledSpec(SelectorSpec):
    """Scores of block means, and a rule for how many to keep.

    The score of a block pair is ``logsumexp over runs a, c of s · q̄_a · k̄_c`` (plain ``s · q̄ · k̄`` with one run), in fp32.
    `key_bias`: the log of the variance of a block's keys (at least 1e-12), or of ``||sum_r (k_r - k̄)^T v_r||`` (PISA). Learned projections
    train where the rule is soft; a hard choice gives them no gradient, so they are frozen there.
    """

    name: ClassVar[str] = "pooled"

    rule: RuleSpec = option(TopKSpec(), "how many blocks are kept", choices=RULES)
    runs: tuple[int, ...] = option((1, 1), "runs that a query block and a key block are cut into", ge=1)
    key_bias: Literal["none", "log_variance", "log_norm"] = option("none", "added to the score of a key block")
    centre: bool = option(False, "subtract the mean of all selectable keys first")
    project: bool = option(False, "learned projections of block means, identity at the start")

    def problems(self, site: Site) -> list[Problem]:
        found = [problem.under("rule") for problem in self.rule.problems(site)]
        if len(self.runs) != 2:
            found.append(
                Problem("runs", f"got {len(self.runs)} numbers", "give two: of query blocks and of key blocks")
            )
        plain = self.runs == (1, 1) and not self.project and self.key_bias == "none"
        if getattr(self.rule, "moments", "") == "diag" and not plain:
            rule = "diag is the variance of plain scores: one run, no projection, no key_bias"
            found.append(Problem("rule.moments", rule, "use exact"))
        if self.softness is not None and self.key_bias != "none":
            found.append(
                Problem("key_bias", "has no gradient, and the rule is soft", "use none, or a rule that chooses")
            )
        return found

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        found = []
        count = getattr(self.rule, "count", None)
        added = getattr(self.rule, "competing", "") == "added"
        if count is not None and count > (blocks := place.grid_keys if added else place.selectable):
            found.append(Problem("rule.count", f"{count} of {blocks} key blocks", f"at most {blocks}"))
        for runs, size, of in zip(self.runs, place.whole, ("query", "key"), strict=False):
            # a tile that the grid cuts may have fewer tokens than runs, and is exact
            if runs > (whole := max(size, place.whole[2])):
                found.append(Problem("runs", f"{runs} runs of a {of} block of {whole} tokens", f"at most {whole}"))
        return found

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        least, expected, most = self.rule.counts(place.selectable, keep, place.extra_selectable)
        sizes = np.sort(place.keys.sizes[: place.selectable])
        queries = place.queries.tokens
        # the smallest and the largest blocks may be the ones chosen
        few, many = int(sizes[:least].sum()), int(sizes[len(sizes) - most :].sum())
        return Bounds(queries * few, round(queries * expected * float(sizes.mean())), queries * many)

    def flops(self, place: Place, site: Site) -> int:
        scores = 2 * place.queries.count * self.runs[0] * place.selectable * self.runs[1] * site.inner
        blocks = place.queries.count + place.selectable
        if self.project:
            scores += 2 * blocks * site.head_dim * site.inner
        if self.key_bias == "log_norm":
            scores += 2 * place.keys.starts[place.selectable] * site.head_dim * site.inner
        return scores

    def parameters(self, site: Site) -> int:
        return 2 * site.head_dim**2 if self.project else 0

    def keeps_all(self) -> bool:
        return self.rule.keeps_all()

    def frozen(self) -> tuple[str, ...]:
        return ("query.weight", "key.weight") if self.project and self.softness is None else ()

    @property
    def softness(self) -> float | None:
        return self.rule.softness

    def build(self, site: Site) -> nn.Module:
        return _Pooled(self, site)


class _Pooled(nn.Module):
    """Scores by block means; learned projections where asked."""

    def __init__(self, spec: PooledSpec, site: Site):
        super().__init__()
        self.spec = spec
        if spec.project:
            size = site.head_dim
            self.query = marked(nn.Linear(size, size, bias=False), weight=Identity())
            self.key = marked(nn.Linear(size, size, bias=False), weight=Identity())
            if spec.softness is None:
                self.requires_grad_(False)

    def scores(self, scene: Scene, lo: int, hi: int) -> Tensor:
        """(B, heads, hi - lo, selectable), fp32 or wider."""
        spec, most = self.spec, scene.place.selectable
        queries, some_q = scene.runs("q", spec.runs[0])
        keys, some_k = scene.runs("k", spec.runs[1])
        queries, keys, some_k = queries[:, :, lo:hi], keys[:, :, :most], some_k[:, :, :most]
        some_q = some_q[:, :, lo:hi] if some_q.shape[2] > 1 else some_q
        if spec.centre:
            total = scene.counts[:, :, :most]
            mean = (scene.k_means[:, :, :most] * total).sum(2, keepdim=True) / total.sum(2, keepdim=True).clamp(min=1)
            keys = keys - mean.unsqueeze(3)
        if spec.project:
            # scores are in fp32 whatever the parameters are in
            queries, keys = (z @ part.weight.to(z.dtype).T for z, part in ((queries, self.query), (keys, self.key)))
        dots = scene.scale * (queries.flatten(2, 3) @ keys.flatten(2, 3).transpose(-1, -2))
        if spec.runs != (1, 1):
            pairs = dots.unflatten(-1, (most, -1)).unflatten(2, (hi - lo, -1))
            both = some_q[:, :, :, :, None, None] & some_k[:, :, None, None]
            dots = pairs.masked_fill(~both, float("-inf")).permute(0, 1, 2, 4, 3, 5).flatten(4).logsumexp(-1)
        if spec.key_bias != "none":
            of_keys = log_norms if spec.key_bias == "log_norm" else log_variances
            dots = dots + scene.once(spec.key_bias, lambda: of_keys(scene)).unsqueeze(2)
        if scene.key_valid is not None:
            dots = dots.masked_fill((scene.counts[:, :, :most] == 0).transpose(-1, -2), float("-inf"))
        return dots

    def soft(self, scene: Scene) -> SoftMap:
        """Weights of all blocks instead of a choice, where the rule is soft."""
        rule = self.spec.rule
        assert isinstance(rule, TopKSpec)
        assert rule.soft is not None
        wanted = rule.weight(scene.place.selectable, scene.place.extra_selectable)
        return soft_map(scene, lambda lo, hi: self.scores(scene, lo, hi), wanted, rule.soft)

    def forward(self, scene: Scene) -> Rows:
        scene.scores = lambda lo, hi: self.scores(scene, lo, hi)

        def rows(lo: int, hi: int) -> Tensor:
            scores = self.scores(scene, lo, hi)
            # a block without a valid key is never worth a visit
            return self.spec.rule.choose(scores, scene, lo) & (scores > float("-inf"))

        runs = self.spec.runs[0] * self.spec.runs[1]
        return in_steps(rows, scene.q, scene.place.selectable * runs)


@dataclass(frozen=True, kw_only=True)
class UnionSpec(SelectorSpec):
    """What any of several selectors chooses: a dynamic one with forced bands and sinks, or several static ones."""

    name: ClassVar[str] = "union"
    minimal: ClassVar[Mapping[str, Any]] = {"of": [{"name": "pooled"}, {"name": "band"}]}

    of: tuple[SelectorSpec, ...] = option(doc="selectors", kind="selector")

    @property
    def is_static(self) -> bool:
        return all(one.is_static for one in self.of)

    @property
    def by_layer(self) -> bool:
        return any(one.by_layer for one in self.of)

    def problems(self, site: Site) -> list[Problem]:
        if not self.of:
            return [Problem("of", "there are none", "give at least one selector")]
        return [p.under(f"of.{i}") for i, one in enumerate(self.of) for p in one.problems(site)]

    def place_problems(self, place: Place, site: Site) -> list[Problem]:
        return [p.under(f"of.{i}") for i, one in enumerate(self.of) for p in one.place_problems(place, site)]

    def map(self, place: Place, site: Site, lo: int, hi: int) -> np.ndarray:
        out = self.of[0].map(place, site, lo, hi)
        for one in self.of[1:]:
            out = out | one.map(place, site, lo, hi)
        return out

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        if self.is_static:
            return super().bounds(place, site, keep)
        fixed = [one for one in self.of if one.is_static]
        # one that stands alone may know its pairs without a map
        forced = fixed[0] if len(fixed) == 1 else UnionSpec(of=tuple(fixed))
        static = forced.bounds(place, site).expected if fixed else 0
        moving = [one.bounds(place, site, keep) for one in self.of if not one.is_static]
        everything = place.queries.tokens * place.keys.starts[place.selectable]
        # what is chosen and what is forced may coincide wholly or not at all; expected as if they were independent
        missed = 1 - static / everything
        for one in moving:
            missed *= 1 - one.expected / everything
        least = max(static, *(one.least for one in moving))
        most = min(everything, static + sum(one.most for one in moving))
        return Bounds(least, min(most, max(least, round(everything * (1 - missed)))), most)

    def flops(self, place: Place, site: Site) -> int:
        return sum(one.flops(place, site) for one in self.of)

    def parameters(self, site: Site) -> int:
        return sum(one.parameters(site) for one in self.of)

    def kept_bytes(self, place: Place, site: Site) -> int:
        return sum(one.kept_bytes(place, site) for one in self.of)

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"of.{i}.{name}" for i, one in enumerate(self.of) for name in one.frozen())

    def keeps_all(self) -> bool:
        return any(one.keeps_all() for one in self.of)

    def build(self, site: Site) -> nn.Module:
        return _Union([one.build(site) for one in self.of])


class _Union(nn.Module):
    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.of = nn.ModuleList(parts)

    def forward(self, scene: Scene) -> Rows:
        made = [part(scene) for part in self.of]

        def rows(lo: int, hi: int) -> Tensor:
            out = made[0](lo, hi)
            for one in made[1:]:
                out = out | one(lo, hi)
            return out

        return rows
