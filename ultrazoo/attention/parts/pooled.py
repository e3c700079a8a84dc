"""The selector that looks at the data: scores of block means, and a rule for which blocks are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from ...errors import Problem
from ...ops.init import Identity, marked
from ...spec import Site, option
from .orders import Place
from .rules import RULES, RuleSpec, TopKSpec, real_blocks
from .scene import Rows, Scene, in_steps
from .selectors import Bounds, SelectorSpec
from .soft import SoftMap, soft_map
from .states import log_norms, log_variances


@dataclass(frozen=True, kw_only=True)
class PooledSpec(SelectorSpec):
    """Scores of block means, and a rule for how many to keep.

    The score of a block pair is ``logsumexp over runs a, c of s · q̄_a · k̄_c`` (plain ``s · q̄ · k̄`` with one run), in fp32.
    `normalise: row` takes each query run's softmax over all key runs first (DFSAttn): scores less their log-sum-exp, so that
    every run of a query block has as much to give. `key_bias`: the log of the variance of a block's keys (at least 1e-12), or of
    ``||sum_r (k_r - k̄)^T v_r||`` (PISA). Learned projections train where the rule is soft; a hard choice gives them no
    gradient, so they are frozen there.
    """

    name: ClassVar[str] = "pooled"
    source: ClassVar[str] = "VSA, arXiv 2505.13389; SubBlock, SGLang #34148"

    rule: RuleSpec = option(TopKSpec(), "how many blocks are kept", choices=RULES)
    runs: tuple[int, ...] = option((1, 1), "runs that a query block and a key block are cut into", ge=1)
    normalise: Literal["none", "row"] = option("none", "scores as they are, or the softmax of each query run's")
    key_bias: Literal["none", "log_variance", "log_norm"] = option("none", "added to the score of a key block")
    centre: bool = option(False, "subtract the mean of all selectable keys first")
    project: bool = option(False, "learned projections of block means, identity at the start")

    def problems(self, site: Site) -> list[Problem]:
        found = [problem.under("rule") for problem in self.rule.problems(site)]
        if len(self.runs) != 2:
            found.append(
                Problem("runs", f"got {len(self.runs)} numbers", "give two: of query blocks and of key blocks")
            )
        elif self.normalise == "row" and self.runs[0] == 1:
            rule = "row moves all scores of a query run by one number, and a query block of one run keeps their order"
            found.append(Problem("normalise", rule, "use none, or more runs of query blocks"))
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
        found = [one.under("rule") for one in self.rule.place_problems(place.selectable, place.extra_selectable)]
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

    @property
    def budgeted(self) -> bool:
        return self.rule.budgeted and self.softness is None

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
        if spec.normalise == "row":
            total = dots.masked_fill(~some_k.flatten(2).unsqueeze(2), float("-inf")).logsumexp(-1, keepdim=True)
            dots = dots - total.masked_fill(total == float("-inf"), 0.0)
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
        wanted = [rule.weight(blocks, extra) for blocks, extra in real_blocks(scene)]
        return soft_map(scene, lambda lo, hi: self.scores(scene, lo, hi), wanted, rule.soft)

    def forward(self, scene: Scene) -> Rows:
        scene.scored_by = self.scores

        def rows(lo: int, hi: int) -> Tensor:
            scores = self.scores(scene, lo, hi)
            # a block without a valid key is never worth a visit
            return self.spec.rule.choose(scores, scene, lo) & (scores > float("-inf"))

        runs = self.spec.runs[0] * self.spec.runs[1]
        return in_steps(rows, scene.q, scene.place.selectable * runs)
