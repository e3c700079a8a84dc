"""Head groups of one layer, each with an attention of its own; one projection and one output for all.

Groups are written like layers: ``{"0-3": {name: full}, "4-11": {name: branched, …}}``, 0-based, every head in one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Site, Start, Traits, option
from .block_sparse import BlockSparseSpec
from .branched import BranchedSpec, BranchSpec
from .contract import Attention, Call, Extra, Host, Positions
from .full import FullSpec
from .linear import LinearSpec
from .parts.adapt import LoraSpec
from .parts.compressors import DepthwiseConvSpec
from .parts.layouts import WindowsSpec
from .parts.orders import RasterSpec
from .parts.pooled import PooledSpec
from .parts.rules import TopKSpec


def head_range(key: str) -> tuple[int, ...]:
    """Heads of a group key such as ``0-3`` or ``0,4-6``; raises ValueError for anything else."""
    heads: list[int] = []
    for part in key.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is not a head or a range of heads")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"{part.strip()!r} runs backwards")
        heads += range(low, high + 1)
    return tuple(heads)


@dataclass(frozen=True, kw_only=True)
class ByHeadSpec(AttentionSpec):
    """An attention per head group. Groups share the host's projections; what a group adds acts on its heads alone."""

    name: ClassVar[str] = "by_head"
    source: ClassVar[str] = "STA, arXiv 2502.04507 (windows per head); CSWin, arXiv 2107.00652"
    formula: ClassVar[str] = "y = W_o concat over groups g of attention_g(Q_g, K_g, V_g), g a range of heads"
    minimal: ClassVar[Mapping[str, Any]] = {
        "groups": {
            "0-5": {"name": "full"},
            "6-11": {"name": "branched", "branches": {"local": {"layout": {"name": "windows", "counts": [4, 4]}}}},
        }
    }

    groups: Mapping[str, AttentionSpec] = option(doc="head ranges → attention", kind="attention")

    def _heads(self) -> list[tuple[str, tuple[int, ...], AttentionSpec]]:
        return [(key, head_range(key), spec) for key, spec in self.groups.items()]

    def expand(self, site: Site) -> AttentionSpec:
        if self.problems_of_keys(site):
            return self
        groups = {key: spec.expand(_site_of(site, heads)) for key, heads, spec in self._heads()}
        return self if all(groups[key] is self.groups[key] for key in groups) else replace(self, groups=groups)

    def problems_of_keys(self, site: Site) -> list[Problem]:
        """Keys that are no ranges, heads that do not exist, are in two groups or in none."""
        found = []
        owner: dict[int, str] = {}
        for key in self.groups:
            try:
                heads = head_range(key)
            except ValueError as error:
                found.append(Problem(f"groups.{key}", f"{error}", "write a head, a range or a list: 0-3 or 0,4-6"))
                continue
            for head in heads:
                if head >= site.heads:
                    found.append(Problem(f"groups.{key}", f"head {head} does not exist: heads are 0-{site.heads - 1}"))
                    break
                if head in owner:
                    found.append(Problem(f"groups.{key}", f"head {head} is in group {owner[head]!r} too"))
                    break
                owner[head] = key
        missing = [head for head in range(site.heads) if head not in owner]
        if missing and not found:
            rule = f"no group has head {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            found.append(Problem("groups", rule, "every head belongs to one group"))
        return found

    def problems(self, site: Site) -> list[Problem]:
        found = self.problems_of_keys(site)
        if found:
            return found
        for key, heads, spec in self._heads():
            found += [problem.under(f"groups.{key}") for problem in spec.problems(_site_of(site, heads))]
        return found

    def cost(self, site: Site) -> Cost:
        costs = [(key, heads, spec.cost(_site_of(site, heads))) for key, heads, spec in self._heads()]

        def average(field: str) -> int:
            value = 0
            for _, heads, cost in costs:
                own = getattr(cost, field)
                # a group that does not say has its pairs; 0 is a number
                value += len(heads) * (cost.pairs if own is None else own)
            return round(value / site.heads)

        rows = tuple(
            BranchCost(
                f"{key}.{row.name}",
                row.pairs,
                row.attention_flops,
                row.projection_flops,
                row.other_flops,
                row.parameters,
            )
            for key, _, cost in costs
            for row in cost.branches
        )
        return Cost(
            pairs=average("pairs"),
            attention_flops=sum(cost.attention_flops for _, _, cost in costs),
            qkv_flops=max(cost.qkv_flops for _, _, cost in costs),
            projection_flops=sum(cost.projection_flops for _, _, cost in costs),
            out_flops=2 * site.tokens * site.inner * site.dim,
            other_flops=sum(cost.other_flops for _, _, cost in costs),
            parameters=sum(cost.parameters for _, _, cost in costs),
            visited_pairs=average("visited_pairs"),
            pairs_min=average("pairs_min"),
            pairs_max=average("pairs_max"),
            peak_elements=max(cost.peak_elements for _, _, cost in costs) + site.tokens * site.inner,
            saved_elements=sum(cost.saved_elements for _, _, cost in costs),
            kept_bytes=sum(cost.kept_bytes for _, _, cost in costs),
            branches=rows,
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        count = site.tokens if queries is None else len(queries)
        seen = np.zeros((site.heads, count, site.tokens), dtype=bool)
        for _, heads, spec in self._heads():
            seen[list(heads)] = spec.visible(_site_of(site, heads), queries)
        return seen

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray | None:
        parts = [spec.reach(_site_of(site, heads), tokens) for _, heads, spec in self._heads()]
        known = [part for part in parts if part is not None]
        return np.logical_or.reduce(known) if len(known) == len(parts) else None

    def traits(self) -> Traits:
        traits = [spec.traits() for spec in self.groups.values()]
        worst = next((t.start for t in traits if t.start.kind == "needs tuning"), None)
        worst = worst or next((t.start for t in traits if t.start.kind != "exact"), Start("exact", "every group is"))
        targets = [t.export for t in traits]
        low = [max(t.min_grid[axis] for t in traits) for axis in range(3)]
        # what groups say of themselves, once each
        notes = dict.fromkeys(t.notes for t in traits if t.notes)
        return Traits(
            start=worst,
            needs=frozenset().union(*(t.needs for t in traits)),
            exact_at_init=all(t.exact_at_init for t in traits),
            export=tuple(target for target in targets[0] if all(target in other for other in targets)),
            visible="exact" if all(t.visible == "exact" for t in traits) else "upper bound",
            extra=all(t.extra for t in traits),
            key_valid=all(t.key_valid for t in traits),
            min_grid=(low[0], low[1], low[2]),
            selects=any(t.selects for t in traits),
            softmax=all(t.softmax for t in traits),
            fullgraph=all(t.fullgraph for t in traits),
            frozen=tuple(f"groups.{i}.{name}" for i, t in enumerate(traits) for name in t.frozen),
            notes="; ".join(notes),
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=20, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        coarse = BranchSpec(compress=DepthwiseConvSpec(factor=2), adapt=LoraSpec(rank=2))
        mixed: dict[str, AttentionSpec] = {
            "0,2": BranchedSpec(branches={"near": BranchSpec(layout=WindowsSpec(counts=2)), "far": coarse}),
            "1": FullSpec(),
        }
        top = PooledSpec(rule=TopKSpec(share=0.4), project=True)
        sparse = BlockSparseSpec(order=RasterSpec(block=6), selector=top)
        return [
            (cls(groups=mixed), site),
            (cls(groups={"1": sparse, "0,2": FullSpec()}), site.at(qk_norm=False)),
            (cls(groups={"0-1": LinearSpec(), "2": FullSpec()}), site.at(grid=Grid(2, 3, 4))),
            (cls(groups={"0-1": FullSpec(), "2": FullSpec()}), site.at(grid=Grid(1, 4, 3))),
        ]


def _site_of(site: Site, heads: tuple[int, ...]) -> Site:
    return site.at(heads=len(heads), host_heads=site.host_heads or site.heads)


class _Raw:
    """The host's projections of one tensor, made once for all groups."""

    def __init__(self, host: Host):
        self.host = host
        self.x: Tensor | None = None
        self.made: dict[str, Any] = {}

    def project(self, x: Tensor, which: str) -> Any:
        if self.x is None:
            self.x = x
        if x is not self.x:
            return self.host.project(x, which)
        if which in ("q", "k", "v") and "qkv" in self.made:
            return self.made["qkv"]["qkv".index(which)]
        if which not in self.made:
            self.made[which] = self.host.project(x, which)
        return self.made[which]


class HeadSlice:
    """A host that shows one head group: projections stay whole (norms may run over all heads), heads are picked after."""

    shares_projections = True

    def __init__(self, raw: _Raw, heads: tuple[int, ...]):
        self.raw, self.picked = raw, heads

    def project(self, x: Tensor, which: str) -> Any:
        return self.raw.project(x, which)

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        found = self.raw.host.heads(q, k, v, positions, key_positions)
        q, k, v = (None if z is None else pick(z, self.picked) for z in found)
        return q, k, v

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        # only hosts whose heads turn by different frequencies have it
        of_heads = getattr(self.raw.host, "rotate_heads", None)
        return self.raw.host.rotate(z, positions) if of_heads is None else of_heads(z, positions, self.picked)

    def out(self, y: Tensor) -> Tensor:
        return y


def pick(z: Tensor, heads: tuple[int, ...]) -> Tensor:
    """(B, n, all heads, D) → (B, n, heads, D); a view where the heads are neighbours."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return z[:, :, heads[0] : heads[-1] + 1]
    return z[:, :, list(heads)]


class ByHeadAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: ByHeadSpec, site: Site):
        super().__init__(spec, site)
        rows = spec._heads()
        self.heads = [heads for _, heads, _ in rows]
        self.groups = nn.ModuleList([group.build(_site_of(site, heads)) for _, heads, group in rows])
        order = [head for heads in self.heads for head in heads]
        self.inverse = None if order == sorted(order) else [order.index(head) for head in range(len(order))]

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        raw = _Raw(host)
        outs, extras = [], []
        for heads, group in zip(self.heads, self.groups, strict=True):
            part = replace(call, extra=None if call.extra is None else _extra_of(call.extra, heads))
            found = group(x, HeadSlice(raw, heads), part)
            y, y_extra = found if call.extra is not None else (found, None)
            outs.append(y.unflatten(-1, (len(heads), -1)))
            extras.append(y_extra)
        out = host.out(self._joined(outs))
        if call.extra is None:
            return out
        return out, self._joined([e.unflatten(-1, (len(h), -1)) for e, h in zip(extras, self.heads, strict=True)])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Head groups (B, n, heads, D) in the host's order, flattened to (B, n, all heads * D)."""
        joined = torch.cat(parts, dim=2)
        if self.inverse is not None:
            joined = joined[:, :, self.inverse]
        return joined.flatten(2)


def _extra_of(extra: Extra, heads: tuple[int, ...]) -> Extra:
    return replace(extra, q=pick(extra.q, heads), k=pick(extra.k, heads), v=pick(extra.v, heads))


ByHeadSpec.module = ByHeadAttention
