"""Rules: from scores of key blocks to the blocks that are kept. Ties go to the block that comes first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import Problem
from ...spec import Options, Site, option
from .scene import Scene

LEAST_VARIANCE = 1e-6 * math.log(2) ** 2
"""Added to the variance of a row's scores: 1e-6 where scores are in powers of two (Sol-Attn)."""


@dataclass(frozen=True, kw_only=True)
class RuleSpec(Options):
    """How many and which of the selectable key blocks a query block keeps."""

    source: ClassVar[str] = ""
    budgeted: ClassVar[bool] = False
    """Does the share that a budget gives stand in for one of its own?"""

    def counts(self, blocks: int, keep: float | None = None, extra: int = 0) -> tuple[int, float, int]:
        """Kept blocks out of `blocks`, of which `extra` are of extra tokens: fewest, expected, most."""
        raise TypeError(f"{type(self).__name__} counts nothing")

    def choose(self, scores: Tensor, scene: Scene, lo: int) -> Tensor:
        """Scores (B, heads, rows, blocks), fp32 or wider, of query blocks from `lo` on → bool of the same shape."""
        raise TypeError(f"{type(self).__name__} chooses nothing")

    def place_problems(self, blocks: int, extra: int = 0) -> list[Problem]:
        """What is wrong with so many selectable blocks, of which `extra` are of extra tokens."""
        return []

    def keeps_all(self) -> bool:
        """Does the rule keep every block whatever the scores?"""
        return False

    @property
    def softness(self) -> float | None:
        """Temperature of a rule that weighs every block instead of choosing some; None where it chooses."""
        return None


def kept(share: float, blocks: int, multiple: int = 1, least: int = 1, down: bool = False) -> int:
    """How many blocks a share of `blocks` is: rounded up or down, then up to a multiple, at least `least`, at most all.

    A share that is whole but for rounding is whole.
    """
    count = math.floor(share * blocks + 1e-9) if down else math.ceil(share * blocks - 1e-9)
    return rounded(count, blocks, multiple, least)


def rounded(count: int, blocks: int, multiple: int = 1, least: int = 1) -> int:
    """A number of blocks up to a multiple, at least `least`, at most all."""
    return min(blocks, max(-(-count // multiple) * multiple, least))


def real_blocks(scene: Scene) -> list[tuple[int, int]]:
    """Selectable blocks with a valid key, and how many of those are of extra tokens: one entry for all samples, or one each
    where tokens are padding, which must not change what other tokens of a batch are given."""
    place = scene.place
    if scene.key_valid is None:
        return [(place.selectable, place.extra_selectable)]
    some = scene.counts[:, 0, : place.selectable, 0] > 0
    of_grid = place.selectable - place.extra_selectable
    return [(int(row.sum()), int(row[of_grid:].sum())) for row in some.cpu()]


def per_sample(table: list[list[int]], like: Tensor) -> int | Tensor:
    """Numbers of every sample (or of all) and head (or of all) as `largest` takes them."""
    if len(table) == len(table[0]) == 1:
        return table[0][0]
    return torch.tensor(table, device=like.device)[:, :, None, None]


def largest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Bool: the `count` largest of the last dimension, one number or (B | 1, heads | 1, 1, 1); ties by the lower index."""
    blocks = scores.shape[-1]
    if isinstance(count, int):
        if count == 0 or count >= blocks:
            return torch.full_like(scores, count > 0, dtype=torch.bool)
        last = scores.topk(count, dim=-1).values[..., -1:]
        wanted: Any = count
    else:
        wanted = count
        ordered = scores.sort(dim=-1, descending=True).values
        at = (wanted - 1).clamp(min=0).expand(*scores.shape[:-1], 1)
        last = ordered.gather(-1, at)
    above = scores > last
    ties = scores == last
    room = wanted - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


@dataclass(frozen=True, kw_only=True)
class TopKSpec(RuleSpec):
    """The highest scores: a share of the blocks, or a number of them."""

    name: ClassVar[str] = "topk"
    budgeted: ClassVar[bool] = True

    share: float | None = option(None, "share of the key blocks; null: 0.1 where there is no count", gt=0, le=1)
    rounding: Literal["up", "down"] = option("up", "a share that is no whole number of blocks")
    count: int | None = option(None, "number of key blocks, instead of a share", ge=1)
    multiple: int = option(1, "round the number up to a multiple of this", ge=1)
    short: Literal["refuse", "all"] = option("refuse", "no more blocks than `multiple`: a problem, or all are kept")
    least: int = option(1, "never fewer than this", ge=1)
    soft: float | None = option(
        None, "temperature of SoftTop-k (SLA2): every block weighed, by weights that add up to the number; dense", gt=0
    )
    competing: Literal["counted", "added"] = option(
        "counted",
        "competing blocks of extra tokens: among those that the share is of, or one more visit each, as many as if all "
        "queries saw them (VSA)",
    )

    def number(self, blocks: int, keep: float | None = None, extra: int = 0) -> int:
        """Kept blocks out of `blocks`, of which `extra` are of extra tokens."""
        added = extra if self.competing == "added" else 0
        among = blocks - added
        if keep is None and self.count is not None:
            return rounded(self.count, among, self.multiple, self.least) + added
        share = self.own_share if keep is None else keep
        return kept(share, among, self.multiple, self.least, self.rounding == "down") + added

    def weight(self, blocks: int, extra: int = 0) -> float:
        """What the soft weights of a row add up to: the share before it is rounded."""
        added = extra if self.competing == "added" else 0
        among = blocks - added
        if self.count is not None:
            return min(self.count, among) + added
        return min(among, max(self.least, self.own_share * among)) + added

    def problems(self, site: Site) -> list[Problem]:
        if self.count is not None and self.share is not None:
            return [Problem("share", f"count: {self.count} is given as well", "give one of them")]
        return []

    def place_problems(self, blocks: int, extra: int = 0) -> list[Problem]:
        """What is wrong with so many blocks, of which `extra` are of extra tokens."""
        among = blocks - extra if self.competing == "added" else blocks
        for name, number in (("count", self.count or 0), ("least", self.least)):
            if number > among:
                return [Problem(name, f"{number} of {among} key blocks", f"at most {among}")]
        if (
            self.short == "refuse"
            and self.multiple >= among
            and replace(self, multiple=1).number(blocks, None, extra) < blocks
        ):
            rule = f"up to a multiple of {self.multiple}, every choice is all {among} key blocks"
            fix = f"at most {among - 1}, smaller blocks, or short: all"
            return [Problem("multiple", rule, fix)]
        return []

    @property
    def own_share(self) -> float:
        """The share where no count is given."""
        return 0.1 if self.share is None else self.share

    def counts(self, blocks: int, keep: float | None = None, extra: int = 0) -> tuple[int, float, int]:
        number = blocks if self.soft is not None else self.number(blocks, keep, extra)
        return number, number, number

    def choose(self, scores: Tensor, scene: Scene, lo: int) -> Tensor:
        numbers = [[self.number(blocks, keep, extra) for keep in scene.keeps] for blocks, extra in real_blocks(scene)]
        return largest(scores, per_sample(numbers, scores))

    def keeps_all(self) -> bool:
        return self.count is None and self.share == 1

    @property
    def softness(self) -> float | None:
        return self.soft


def _smallest_mass(scores: Tensor, masses: Sequence[float]) -> Tensor:
    """Bool: the fewest blocks whose softmax over the last dimension reaches a mass, one for all heads or one each; ties by
    the lower index."""
    if min(masses) >= 1:
        # every block has some mass, however little of it a float holds
        return torch.ones_like(scores, dtype=torch.bool)
    weights = scores.softmax(-1)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    # the first block is kept even where its weight is the whole mass
    wanted = before < scores.new_tensor([mass if mass < 1 else math.inf for mass in masses])[:, None, None]
    wanted[..., 0] = True
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


@dataclass(frozen=True, kw_only=True)
class TopPSpec(RuleSpec):
    """The fewest blocks whose softmax mass reaches p. A budget's share is another p."""

    name: ClassVar[str] = "topp"
    budgeted: ClassVar[bool] = True

    p: float = option(0.9, "mass of the row's softmax over block scores", gt=0, le=1)
    floor: float = option(0.0, "never a smaller share of the blocks than this", ge=0, le=1)
    expected: float = option(0.3, "kept share that a plan assumes; the data decides", gt=0, le=1)

    def counts(self, blocks: int, keep: float | None = None, extra: int = 0) -> tuple[int, float, int]:
        fewest = kept(self.floor, blocks)
        if (self.p if keep is None else keep) == 1:
            return blocks, blocks, blocks
        return fewest, max(fewest, self.expected * blocks), blocks

    def choose(self, scores: Tensor, scene: Scene, lo: int) -> Tensor:
        found = _smallest_mass(scores, [self.p if keep is None else keep for keep in scene.keeps])
        if not self.floor:
            return found
        floors = [[kept(self.floor, blocks)] for blocks, _ in real_blocks(scene)]
        return found | largest(scores, per_sample(floors, scores))

    def keeps_all(self) -> bool:
        return self.p == 1 or self.floor == 1


@dataclass(frozen=True, kw_only=True)
class TopKOrPSpec(RuleSpec):
    """What top-k or top-p keeps (SpargeAttention2, arXiv 2602.13515). A budget's share is top-k's."""

    name: ClassVar[str] = "topk_or_topp"
    budgeted: ClassVar[bool] = True

    share: float = option(0.03, "share of the blocks that top-k keeps", gt=0, le=1)
    p: float = option(0.2, "mass that top-p keeps", gt=0, le=1)
    expected: float = option(0.05, "kept share that a plan assumes; the data decides", gt=0, le=1)

    def counts(self, blocks: int, keep: float | None = None, extra: int = 0) -> tuple[int, float, int]:
        if self.p == 1:
            return blocks, blocks, blocks
        fewest = kept(self.share if keep is None else keep, blocks)
        return fewest, max(fewest, self.expected * blocks), blocks

    def choose(self, scores: Tensor, scene: Scene, lo: int) -> Tensor:
        top = TopKSpec(share=self.share)
        return top.choose(scores, scene, lo) | _smallest_mass(scores, (self.p,))

    def keeps_all(self) -> bool:
        return self.share == 1 or self.p == 1


@dataclass(frozen=True, kw_only=True)
class MeanStdSpec(RuleSpec):
    """Scores above mean + tau · standard deviation of the row's scores over key blocks (Sol-Attn, arXiv 2607.24027).

    `moments`: ``exact``, of the scores themselves; ``diag``, from the variances of the pooled keys' channels, as if they
    were independent. Over key blocks that hold a valid key. `tau` null or minus infinity keeps every block; a row may keep
    none (that of a single block does), so force a band beside it or choose a far field.
    """

    name: ClassVar[str] = "mean_std"

    tau: float | None = option(1.0, "standard deviations above the mean; null: every block")
    moments: Literal["diag", "exact"] = option("diag", "how the row's variance is taken")

    def counts(self, blocks: int, keep: float | None = None, extra: int = 0) -> tuple[int, float, int]:
        if self.keeps_all():
            return blocks, blocks, blocks
        assert self.tau is not None
        # a normal law of scores, as the source assumes; the data decides
        return 0, blocks * (1 - NormalDist().cdf(self.tau)), blocks

    def choose(self, scores: Tensor, scene: Scene, lo: int) -> Tensor:
        if self.keeps_all():
            return torch.ones_like(scores, dtype=torch.bool)
        assert self.tau is not None
        some = (scene.counts[:, :, : scores.shape[-1]] > 0).to(scores.dtype)  # (B | 1, 1, blocks, 1)
        blocks = some.sum(2).clamp(min=1)
        row = some.transpose(-1, -2)
        finite = scores.masked_fill(row == 0, 0.0)
        mean = finite.sum(-1, keepdim=True) / blocks.unsqueeze(2)
        if self.moments == "exact":
            variance = ((finite - mean).square() * row).sum(-1, keepdim=True) / blocks.unsqueeze(2)
        else:
            keys = scene.k_means[:, :, : scores.shape[-1]]
            queries = scene.q_means[:, :, lo : lo + scores.shape[2]]
            centred = keys - (keys * some).sum(2, keepdim=True) / blocks.unsqueeze(2)
            spread = (centred.square() * some).sum(2) / blocks
            variance = scene.scale**2 * (queries.square() @ spread.unsqueeze(-1))
        return scores > mean + self.tau * (variance.clamp(min=0) + LEAST_VARIANCE).sqrt()

    def keeps_all(self) -> bool:
        return self.tau is None or self.tau == float("-inf")


RULES: Mapping[str, type[RuleSpec]] = {
    "topk": TopKSpec,
    "topp": TopPSpec,
    "topk_or_topp": TopKOrPSpec,
    "mean_std": MeanStdSpec,
}
