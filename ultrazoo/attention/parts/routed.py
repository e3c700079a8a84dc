"""The selector of VMoBA (arXiv 2506.23858): key blocks by ``q · k̄``, chosen for each query or for all queries of a head.

A query's own block is always chosen, and counts. By mass: scores are moved and scaled to [0, 1] over the blocks of the query
(or over all pairs of the head), and the highest are taken until their sum reaches `p` of the whole, at least one beside the own
block. By number: `count` blocks per query, own block included, or as many as that on average over a head's queries.

Over a head, scores are made a few rows at a time and made again: the lowest score that is taken is found digit by digit
(16 bits of the float at a time), so that no map of scores is ever held. Pairs that score exactly as much are all taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import Problem
from ...ops.blocks import block_counts
from ...spec import Site, option
from .orders import Place
from .scene import Rows, Scene, in_steps
from .selectors import Bounds, SelectorSpec

STEP = {"cpu": 1 << 18}
"""Scores among which the lowest is sought at a time, per kind of device; on a CPU as many as its cache holds."""
STEP_ELSEWHERE = 1 << 24
_DIGIT = 16
MASS = 0.25
"""The published mass."""


@dataclass(frozen=True, kw_only=True)
class RoutedSpec(SelectorSpec):
    """Own blocks and the best of the others, by a threshold on their mass or by number."""

    name: ClassVar[str] = "routed"
    source: ClassVar[str] = "VMoBA, arXiv 2506.23858"

    scope: Literal["query", "head"] = option("head", "what is ranked: one query's blocks, or all pairs of a head")
    p: float | None = option(
        None,
        "mass of the scores, moved and scaled to 0 … 1, that is kept; null: 0.25 where there is no count",
        gt=0,
        le=1,
    )
    count: int | None = option(None, "blocks per query, own one included, instead of p; at most all", ge=1)
    expected: float = option(0.18, "kept share that a plan assumes for p; the data decides", gt=0, le=1)

    def bounds(self, place: Place, site: Site, keep: float | None = None) -> Bounds:
        sizes = np.sort(place.keys.sizes[: place.selectable])
        queries, everything = place.queries.tokens, int(sizes.sum())
        if self.keeps_all() or (self.count is not None and self.count >= len(sizes)):
            return Bounds(*[queries * everything] * 3)
        if self.count is not None:
            few, many = int(sizes[: self.count].sum()), int(sizes[len(sizes) - self.count :].sum())
            # over a head, pairs that tie with the last one are kept too
            most = everything if self.scope == "head" else many
            return Bounds(queries * few, round(queries * self.count * float(sizes.mean())), queries * most)
        # with a single block there is no other; over a head a single query may have the one that is
        least = queries * int(sizes[0])
        return Bounds(least, max(least, round(queries * self.expected * everything)), queries * everything)

    def flops(self, place: Place, site: Site) -> int:
        everything = self.keeps_all() or (self.count is not None and self.count >= place.selectable)
        # over a head: two digits of an fp32 score, and the rows themselves
        passes = 1 if self.scope == "query" or everything else 3
        return passes * 2 * place.queries.count * place.selectable * site.inner

    @property
    def mass(self) -> float:
        """The mass that is kept where no number of blocks is given."""
        return MASS if self.p is None else self.p

    def problems(self, site: Site) -> list[Problem]:
        if self.p is not None and self.count is not None:
            return [Problem("p", f"count: {self.count} is given as well", "give one of them")]
        return []

    def keeps_all(self) -> bool:
        return self.count is None and self.mass == 1

    def build(self, site: Site) -> nn.Module:
        return _Routed(self)


class _Routed(nn.Module):
    """Scores, own blocks, and the cut between what is kept and what is not."""

    def __init__(self, spec: RoutedSpec):
        super().__init__()
        self.spec = spec

    def forward(self, scene: Scene) -> Rows:
        spec, most = self.spec, scene.place.selectable
        own = _own_blocks(scene)
        counts = scene.counts[:, :, :most].transpose(-1, -2)  # (B | 1, 1, 1, blocks)
        asked = block_counts(scene.place.queries, scene.q.device, scene.query_valid) > 0

        def scores(lo: int, hi: int) -> Tensor:
            found = scene.scale * (scene.q_means[:, :, lo:hi] @ scene.k_means[:, :, :most].transpose(-1, -2))
            return found.masked_fill(counts == 0, float("-inf"))

        def rows(lo: int, hi: int) -> Tensor:
            found, mine = scores(lo, hi), own(lo, hi)
            # a query that is not real takes nothing, and counts for nothing
            found = found.masked_fill(~asked[:, :, lo:hi], float("-inf"))
            if spec.keeps_all() or (spec.count is not None and spec.count >= most):
                return found > float("-inf")
            if spec.scope == "query":
                return _of_queries(spec, found, mine)
            others = found.masked_fill(mine, float("-inf"))
            return (mine | (others >= scene.once("routed", cut)[..., None, None])) & (found > float("-inf"))

        def cut() -> Tensor:
            return _Cut(scene, scores, own, asked).find(spec)

        return in_steps(rows, scene.q, most)


def _of_queries(spec: RoutedSpec, scores: Tensor, own: Tensor) -> Tensor:
    """Bool like `scores` (B, heads, rows, blocks): what each row takes."""
    real = scores > float("-inf")
    own = own & real
    others = scores.masked_fill(own, float("-inf"))
    order = others.argsort(dim=-1, descending=True, stable=True)
    if spec.count is not None:
        wanted = torch.arange(scores.shape[-1], device=scores.device) < spec.count - own.sum(-1, keepdim=True)
    else:
        weights = _scaled(scores, real, (-1,))
        total = weights.sum(-1, keepdim=True)
        need = spec.mass * total - (weights * own).sum(-1, keepdim=True)
        reached = (weights * ~own).gather(-1, order).cumsum(-1)
        wanted = (torch.nn.functional.pad(reached, (1, -1)) < need) | (total == 0)
        wanted[..., 0] = True
    chosen = torch.zeros_like(real).scatter_(-1, order, wanted)
    return (chosen | own) & real


def _scaled(scores: Tensor, real: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Real scores moved and scaled to 0 … 1 over `dims`; 0 where all are equal or none is real."""
    low = scores.masked_fill(~real, float("inf")).amin(dims, keepdim=True)
    high = scores.masked_fill(~real, float("-inf")).amax(dims, keepdim=True)
    return _between(scores, low, high).masked_fill(~real, 0.0)


def _between(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    spread = high - low
    return (scores - low) / torch.where(spread > 0, spread, torch.ones_like(spread))


def _own_blocks(scene: Scene) -> Callable[[int, int], Tensor]:
    """``own(lo, hi)``: bool (1, 1, hi - lo, selectable), which key blocks hold a token of query block lo..hi."""
    place, device = scene.place, scene.q.device
    grid = place.grid.tokens
    at = {row: grid + i for i, row in enumerate(place.key_rows)}
    keys = np.concatenate([np.arange(grid), np.array([at.get(row, -1) for row in place.query_rows], dtype=np.int64)])
    block = np.searchsorted(np.asarray(place.keys.starts), keys, side="right") - 1
    block[(keys < 0) | (block >= place.selectable)] = -1
    starts = np.asarray(place.queries.starts)
    query = np.repeat(np.arange(place.queries.count), place.queries.sizes)

    def own(lo: int, hi: int) -> Tensor:
        tokens = slice(starts[lo], starts[hi])
        some = block[tokens] >= 0
        found = torch.zeros(hi - lo, place.selectable, dtype=torch.bool, device=device)
        rows = torch.as_tensor(query[tokens][some] - lo, device=device)
        found[rows, torch.as_tensor(block[tokens][some], device=device)] = True
        return found[None, None]

    return own


def _ordinal(scores: Tensor) -> Tensor:
    """Integers as wide as the floats, in their order."""
    whole = torch.int64 if scores.dtype == torch.float64 else torch.int32
    # -0.0 and 0.0 are one score
    bits = (scores + 0.0).view(whole)
    sign = torch.iinfo(whole).bits - 1
    return (bits >> sign).bitwise_and_(torch.iinfo(whole).max).bitwise_xor_(bits)


def _score(ordinal: Tensor, dtype: torch.dtype) -> Tensor:
    """The float of an ordinal."""
    whole = torch.int64 if dtype == torch.float64 else torch.int32
    return torch.where(ordinal < 0, ordinal ^ torch.iinfo(whole).max, ordinal).to(whole).view(dtype)


@dataclass
class _Part:
    """Some queries' scores (B, heads, rows, blocks); which are real, None where all are; and which of those are own blocks."""

    scores: Tensor
    real: Tensor | None
    own: Tensor

    def others(self) -> Tensor:
        return ~self.own.expand(self.scores.shape) if self.real is None else self.real & ~self.own

    def where_real(self, other: float) -> Tensor:
        return self.scores if self.real is None else self.scores.masked_fill(~self.real, other)


class _Histogram:
    """Numbers and sums of scores of every pair of sample and head, by one digit: (pairs * bins,) each, fp64."""

    def __init__(self, shape: torch.Size, device: torch.device):
        self.shape, self.bins = shape, 1 << _DIGIT
        # one bin more, for what does not count
        self.numbers = torch.zeros(shape.numel() * self.bins + 1, dtype=torch.float64, device=device)
        self.sums = torch.zeros_like(self.numbers)

    def add(self, pair: Tensor, digit: Tensor, scores: Tensor, some: Tensor | None = None) -> None:
        """Scores of `pair` (an index over samples and heads) with that digit, all broadcastable; `some`: which count."""
        at = pair * self.bins + digit
        at = at if some is None else at.masked_fill_(~some, len(self.numbers) - 1)
        at, scores = at.flatten(), scores.flatten().double()
        self.numbers.scatter_add_(0, at, torch.ones_like(scores))
        self.sums.scatter_add_(0, at, scores)

    def found(self) -> tuple[Tensor, Tensor]:
        """(B, heads, bins) each."""
        numbers, sums = (z[:-1].view(*self.shape, self.bins) for z in (self.numbers, self.sums))
        return numbers, sums


class _Cut:
    """The lowest score that a head takes, over all its queries."""

    def __init__(
        self,
        scene: Scene,
        scores: Callable[[int, int], Tensor],
        own: Callable[[int, int], Tensor],
        asked: Tensor,
    ):
        self.queries, self.scores, self.own, self.asked = scene.place.queries.count, scores, own, asked
        self.shape, self.device = scene.q.shape[:2], scene.q.device
        held = STEP.get(self.device.type, STEP_ELSEWHERE)
        step = held // (self.shape[0] * self.shape[1] * scene.place.selectable)
        # a matmul rounds its last rows otherwise where they are few, and scores are made again for what is taken
        self.step = step // 64 * 64 if step > 64 else max(1, step)
        self.dtype = torch.promote_types(scene.q.dtype, torch.float32)
        self.all_real = bool(asked.all()) and bool((scene.counts[:, :, : scene.place.selectable] > 0).all())
        self.pair = torch.arange(self.shape.numel(), device=self.device).view(*self.shape, 1, 1)

    def parts(self) -> Iterator[_Part]:
        for lo in range(0, self.queries, self.step):
            hi = min(lo + self.step, self.queries)
            found, own = self.scores(lo, hi), self.own(lo, hi)
            real = None if self.all_real else (found > float("-inf")) & self.asked[:, :, lo:hi]
            yield _Part(found, real, own if real is None else own & real)

    @torch.no_grad()
    def find(self, spec: RoutedSpec) -> Tensor:
        """Scores (B, heads); NaN where nothing is taken."""
        low = torch.full(self.shape, float("inf"), device=self.device, dtype=torch.float64)
        high, zero = -low, torch.zeros_like(low)
        # numbers and sums of own blocks; queries that are real
        kept, mine, rows = zero, zero, zero
        histogram, shift = _Histogram(self.shape, self.device), torch.finfo(self.dtype).bits - _DIGIT
        for part in self.parts():
            low = torch.minimum(low, part.where_real(float("inf")).amin((2, 3)))
            high = torch.maximum(high, part.where_real(float("-inf")).amax((2, 3)))
            kept = kept + part.own.sum((2, 3))
            mine = mine + part.scores.masked_fill(~part.own, 0.0).sum((2, 3), dtype=torch.float64)
            rows = rows + (part.scores.shape[2] if part.real is None else part.real.any(-1).sum(-1))
            # the first digit has the sign
            digit = (_ordinal(part.scores) >> shift) + histogram.bins // 2
            histogram.add(self.pair, digit, part.scores, part.others())
        numbers, sums = histogram.found()
        if spec.count is not None:
            need = spec.count * rows - kept
            taken = _score(self._descend(numbers, sums, need, None), self.dtype)
            return taken.masked_fill(need <= 0, float("nan"))
        # a score moved and scaled is (score - low) / (high - low), so that sums of scores tell sums of those
        spread = torch.where(high > low, high - low, 1.0)
        total, mine = sums.sum(-1) + mine - (numbers.sum(-1) + kept) * low, mine - kept * low
        need = torch.where(total > 0, (spec.mass * total - mine) / spread, float("inf"))
        return _score(self._descend(numbers, sums, need, (low, spread)), self.dtype)

    def _descend(self, numbers: Tensor, sums: Tensor, need: Tensor, scale: tuple[Tensor, Tensor] | None) -> Tensor:
        """The highest ordinal at which the pairs from there up weigh `need`, moved and scaled by `scale` (lowest score and
        spread), or number that many where it is None; the first digit's `numbers` and `sums` are there. int64."""
        digit, need = _reached(numbers, sums, need, scale)
        prefix = digit - (1 << _DIGIT) // 2
        for shift in range(torch.finfo(self.dtype).bits - 2 * _DIGIT, -1, -_DIGIT):
            digit, need = _reached(*self._within(prefix, shift), need, scale)
            prefix = (prefix << _DIGIT) | digit
        return prefix

    def _within(self, prefix: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Numbers and sums by the digit at `shift`, of scores whose higher digits are `prefix` (B, heads)."""
        histogram = _Histogram(self.shape, self.device)
        for part in self.parts():
            ordinal = _ordinal(part.scores)
            some = (ordinal >> (shift + _DIGIT) == prefix[..., None, None].to(ordinal.dtype)) & part.others()
            at = some.flatten().nonzero()[:, 0]
            digit = (ordinal.flatten()[at] >> shift) & (histogram.bins - 1)
            histogram.add(at // some[0, 0].numel(), digit, part.scores.flatten()[at])
        return histogram.found()


def _reached(numbers: Tensor, sums: Tensor, need: Tensor, scale: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The highest digit at which the scores from there up reach `need`, of (B, heads, digits); and what of it those above it
    leave. Where rounding lets nothing reach it, the lowest that there is."""
    weight = numbers
    if scale is not None:
        low, spread = (z[..., None] for z in scale)
        weight = (sums - numbers * low) / spread
    weight, some = weight.flip(-1), numbers.flip(-1) > 0
    above, last = weight.cumsum(-1), weight.shape[-1] - 1
    enough = (above >= need[..., None]) & some
    lowest = last - some.int().flip(-1).argmax(-1)
    place = torch.where(enough.any(-1), enough.int().argmax(-1), lowest)
    before = (above - weight).gather(-1, place[..., None])[..., 0]
    return last - place, need - before
