"""Branched attention: branches side by side, fused, then one output projection.

Each branch compresses, lays out, attends, restores and lifts: ``y = W_o · fuse(branch_1(x), …)``. UltraGen (arXiv
2510.18775), T3-Video (2512.13492), Swin (2103.14030), MaxViT (2204.01697), axial attention and PixArt-Sigma's key
compression (2403.04692) are settings of it. Branches that come to the same computation are computed once.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..errors import Problem
from ..grid import AXES, Grid
from ..ports import EXPORTS
from ..spec import AttentionSpec, BranchCost, Cost, Options, Rope, Site, Start, Traits, option
from .branch import Branch, Shared
from .contract import Attention, Call, Host, refuse_segments
from .full import kernel_problems
from .geometry import Geometry, geometry, influence, spread
from .grouped import attend_extra
from .parts.adapt import ADAPT, AdaptSpec, LoraSpec, SharedSpec
from .parts.base import CompressSpec, FuseSpec, LayoutSpec, ShiftSpec
from .parts.compressors import AvgPoolSpec, DepthwiseConvSpec, StrideSpec, Unlifted, lift_flops, lift_parameters
from .parts.coords import CoordsSpec
from .parts.fuse import LseSpec, TimeGateSpec, TokenGateSpec, WeightsSpec
from .parts.layouts import StridedSpec, WholeSpec, WindowsSpec
from .parts.shifts import NoShiftSpec, RepartitionSpec, RollSpec


@dataclass(frozen=True, kw_only=True)
class BranchSpec(Options):
    """One branch."""

    compress: CompressSpec | None = option(None, "many tokens to one; null: every token", kind="compress")
    layout: LayoutSpec = option(WholeSpec(), "which tokens attend to each other", kind="layout")
    shift: ShiftSpec = option(NoShiftSpec(), "how windows move on odd layers", kind="shift")
    adapt: AdaptSpec = option(SharedSpec(), "where q, k and v come from", choices=ADAPT)
    coords: CoordsSpec = option(CoordsSpec(), "what the rotary embedding is told")

    @property
    def compresses_queries(self) -> bool:
        return self.compress is not None and self.compress.of == "both"

    def place(self, site: Site) -> Geometry:
        return geometry(self.compress, self.layout, self.shift, site.grid, site.layer)

    def problems(self, site: Site) -> list[Problem]:
        found = []
        for path, part in (("compress", self.compress), ("layout", self.layout), ("shift", self.shift)):
            if part is not None:
                found += [problem.under(path) for problem in part.problems(site)]
        found += [problem.under("adapt") for problem in self.adapt.problems(site)]
        found += [problem.under("coords") for problem in self.coords.problems(site)]
        found += self._shift_problems()
        keys_only = self.compress is not None and self.compress.of == "keys"
        if keys_only and self.layout.ragged == "resize":
            found.append(Problem("layout.ragged", "resize needs queries and keys on one grid", "use ragged: exact"))
        if found:
            return found
        coarse = site.grid if self.compress is None else self.compress.coarse(site.grid)
        found += [problem.under("layout") for problem in self.layout.fits(coarse, site, self.shift)]
        if not found and keys_only and not self.place(site).matched:
            rule = "queries and compressed keys get different numbers of windows"
            found.append(Problem("layout", rule, "use counts that fit the compressed grid, or layout whole"))
        return found

    def _shift_problems(self) -> list[Problem]:
        given, shift = self.layout.given_by, self.shift
        if shift.needs == "counts" and given != "counts":
            rule = f"shift {shift.name!r} needs windows by counts, layout {self.layout.name!r} has none"
            return [Problem("shift", rule, "give layout: {name: windows, counts: …}, or another shift")]
        if shift.needs == "windows" and not given:
            return [Problem("shift", f"shift {shift.name!r} moves windows, layout {self.layout.name!r} has none")]
        if isinstance(shift, RollSpec) and shift.amount is not None and given == "counts":
            return [Problem("shift.amount", "windows by counts differ in size and always move by half", "leave it out")]
        return []

    def plain(self, site: Site) -> bool:
        """Does a fresh branch compute full attention?"""
        fresh = isinstance(self.adapt, SharedSpec) or (isinstance(self.adapt, LoraSpec) and self._zero_lora())
        whole = all(cut.whole for cut in self.place(site).q_cuts)
        return self.compress is None and whole and fresh and self.coords in (CoordsSpec(), CoordsSpec(cell="index"))

    def _zero_lora(self) -> bool:
        return isinstance(self.adapt, LoraSpec) and self.adapt.init == "zero" and self.adapt.key_from == "key"


@dataclass(frozen=True, kw_only=True)
class BranchedSpec(AttentionSpec):
    """Branches by name, and how they are fused."""

    name: ClassVar[str] = "branched"
    source: ClassVar[str] = "UltraGen, arXiv 2510.18775; T3-Video, arXiv 2512.13492"
    formula: ClassVar[str] = "y = W_o fuse over branches b of lift_b(softmax(Q_b K_b^T / sqrt(D)) V_b in b's groups)"
    minimal: ClassVar[Mapping[str, Any]] = {
        "branches": {
            "local": {"layout": {"name": "windows", "counts": [4, 4]}},
            "overview": {"compress": {"name": "avg_pool", "factor": 4}},
        }
    }

    branches: Mapping[str, BranchSpec] = option(doc="branches by name")
    fuse: FuseSpec = option(WeightsSpec(), "how the branches' outputs become one", kind="fuse")
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.branches)

    def problems(self, site: Site) -> list[Problem]:
        if not self.branches:
            return [Problem("branches", "there are none", "give at least one")]
        found = []
        for name, branch in self.branches.items():
            if not name.isidentifier():
                found.append(Problem(f"branches.{name}", "a branch's name is a word: letters, digits and _"))
            elif hasattr(nn.ModuleDict, name):
                found.append(Problem(f"branches.{name}", "torch keeps this name for itself", "choose another"))
            found += [problem.under(f"branches.{name}") for problem in branch.problems(site)]
        found += [problem.under("fuse") for problem in self.fuse.problems(site)]
        found += [problem.under("fuse") for problem in self.fuse.branch_problems(self.names, site)]
        found += kernel_problems(self.kernel, ("lse",) if self.fuse.wants_lse else ())
        if self.fuse.wants_lse:
            for name, branch in self.branches.items():
                if branch.compresses_queries or branch.layout.ragged == "resize":
                    rule = (
                        f"fuse {self.fuse.name!r} joins softmaxes of the same queries; this branch changes its queries"
                    )
                    found.append(Problem(f"branches.{name}", rule, "compress of: keys only, or use another fuse"))
        return found

    # --- what it costs ----------------------------------------------------------------------------------------------

    def distinct(self, site: Site) -> dict[str, str]:
        """Each branch → the branch whose computation it shares (itself, where it is the first of its kind)."""
        seen: dict[Any, str] = {}
        out = {}
        for name, branch in self.branches.items():
            key: Any = name
            if branch.compress is None and isinstance(branch.adapt, SharedSpec) and branch.layout.ragged == "exact":
                place = branch.place(site)
                cuts = tuple(cut.canonical() for cut in place.q_cuts)
                key = (cuts, None if site.rope is None else replace(branch.coords, cell="centre"))
            out[name] = seen.setdefault(key, name)
        return out

    def cost(self, site: Site) -> Cost:
        shared = 0
        rows, owned = [], self.fuse.parameters(self.names, site)
        other, peak, saved = self.fuse.flops(self.names, site), 0, site.tokens * site.dim
        outputs = whole = 0
        distinct = self.distinct(site)
        extra = site.extra_tokens
        for name, branch in self.branches.items():
            place = branch.place(site)
            plain = branch.compress is None and isinstance(branch.adapt, SharedSpec) and place.q_grid == site.grid
            computed = distinct[name] == name
            with_extra = extra if not self.fuse.wants_lse or name == self.names[0] else 0
            pairs = (place.pairs + place.q_grid.tokens * with_extra) if computed else 0
            matmuls, flops, uses_x = _projections(branch, place, site)
            if plain:
                shared = max(shared, matmuls)
            elif uses_x:
                # queries of the unchanged input are the host's own and shared with other branches
                shared = max(shared, uses_x)
                flops += matmuls - uses_x
            else:
                flops += matmuls
            parameters = branch.adapt.parameters(site)
            branch_other = 0
            if branch.compress is not None:
                parameters += branch.compress.parameters(site) + lift_parameters(branch.compress, site)
                branch_other = branch.compress.flops(site) + lift_flops(branch.compress, site)
            attended = place.q_grid.tokens + 2 * place.k_grid.tokens
            peak = max(peak, 2 * attended * site.width)
            saved += 2 * attended * site.width + 2 * site.tokens * site.inner
            waits = self.fuse.takes_unlifted and branch.compresses_queries and branch.compress.cell[0] == 1
            outputs += (place.q_grid.tokens if waits else site.tokens) * site.inner
            whole += not waits
            rows.append(BranchCost(name, pairs, 4 * pairs * site.inner, flops, branch_other, parameters))
            owned += parameters
            other += branch_other
        pairs = sum(row.pairs for row in rows)
        if not whole:
            # one of them is lifted, for the others to be added to
            peak = max(peak, site.tokens * site.inner)
        if extra:
            pairs += extra * (site.tokens + extra)
            shared = max(shared, 2 * site.tokens * site.dim * 3 * site.width)
        return Cost(
            pairs=pairs,
            attention_flops=4 * pairs * site.inner,
            qkv_flops=shared,
            projection_flops=sum(row.projection_flops for row in rows),
            out_flops=2 * site.tokens * site.inner * site.dim,
            other_flops=other,
            parameters=owned,
            peak_elements=peak + outputs + site.tokens * site.inner,
            saved_elements=saved,
            branches=tuple(rows),
        )

    # --- what it sees -----------------------------------------------------------------------------------------------

    def visible_by_branch(self, site: Site, queries: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Influence through each branch alone: name → bool (queries, N)."""
        return {name: influence(branch.place(site), branch.compress, queries) for name, branch in self.branches.items()}

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        seen = [influence(branch.place(site), branch.compress, queries) for branch in self._counted()]
        return np.logical_or.reduce(seen)[None]

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        return np.logical_or.reduce([spread(b.place(site), b.compress, tokens) for b in self._counted()])

    def _counted(self) -> list[BranchSpec]:
        """Branches whose weight is not fixed at zero."""
        weights = self.fuse.weights if isinstance(self.fuse, WeightsSpec) and not self.fuse.learned else None
        return [branch for name, branch in self.branches.items() if weights is None or weights[name] != 0]

    def traits(self) -> Traits:
        exact = self._exact()
        start = Start("exact", "computes full attention") if exact else Start("needs tuning", "changes what tokens see")
        needs = {"timestep"} if self.fuse.needs_timestep else set()
        smallest = [1, 1, 1]
        for branch in self.branches.values():
            cell = (1, 1, 1) if branch.compress is None else branch.compress.cell
            layout = branch.layout.min_grid(branch.shift)
            for axis in range(len(AXES)):
                need = max(layout[axis], 2 if cell[axis] > 1 else 1) * cell[axis]
                smallest[axis] = max(smallest[axis], need)
        resizes = any(
            branch.layout.ragged == "resize" or (branch.compress is not None and branch.compress.ragged == "resize")
            for branch in self.branches.values()
        )
        stretched = any(
            branch.coords.rule != "none" and branch.coords.origin == "window" for branch in self.branches.values()
        )
        notes = "ragged: resize chooses sizes by arithmetic on plain ints" if resizes else ""
        if stretched and not resizes:
            notes = "a rope rule with window origin depends on the longest window, which is a plain int"
        notes = notes or next((branch.layout.fixed for branch in self.branches.values() if branch.layout.fixed), "")
        return Traits(
            start=start,
            needs=frozenset(needs),
            exact_at_init=exact,
            export=() if notes else EXPORTS,
            key_valid=not resizes,
            min_grid=(smallest[0], smallest[1], smallest[2]),
            notes=notes,
        )

    def _exact(self) -> bool:
        """Full attention at the start, at every site: every branch with a weight is, and the weights add up to 1."""
        site = Site(dim=8, heads=1, head_dim=8, grid=Grid(4, 64, 64), layer=1, layers=2)
        whole = all(isinstance(branch.layout, WholeSpec) for branch in self.branches.values())
        if not whole or not all(branch.plain(site) for branch in self.branches.values()):
            return False
        if isinstance(self.fuse, WeightsSpec):
            return abs(sum(self.fuse.shares(self.names).values()) - 1) < 1e-9
        if isinstance(self.fuse, LseSpec):
            return len(self.branches) == 1
        return isinstance(self.fuse, TimeGateSpec) or (
            isinstance(self.fuse, TokenGateSpec)
            and (self.fuse.act == "softmax" or (self.fuse.init is None and self.fuse.act in ("none", "sigmoid")))
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        return list(_examples(cls))


def _projections(branch: BranchSpec, place: Geometry, site: Site) -> tuple[int, int, int]:
    """FLOPs of the host's matmuls, of the branch's own, and how much of the former is of the unchanged input."""
    queries, keys = place.q_grid.tokens, place.k_grid.tokens
    one = 2 * site.dim * site.width
    per = {"q": queries, "k": keys, "v": keys}
    used = branch.adapt.host_matmuls()
    matmuls = sum(one * per[name] for name in used)
    if "k" not in used and "q" in used and queries != keys:
        matmuls += one * keys
    same = place.q_grid == site.grid and branch.layout.ragged == "exact" and not branch.compresses_queries
    from_x = one * queries if same and "q" in used else 0
    if same and branch.compress is None and used:
        matmuls = from_x = 3 * one * queries
    return matmuls, branch.adapt.flops(site, queries, keys), from_x


def _examples(cls: type[BranchedSpec]) -> Iterator[tuple[AttentionSpec, Site]]:
    rope = Rope(axes=(4, 2, 2))
    site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True, layer=1, layers=2)
    window = WindowsSpec(counts=2)
    ultragen = {
        "local": BranchSpec(layout=window, shift=RepartitionSpec(), coords=CoordsSpec(origin="window")),
        "regional": BranchSpec(
            compress=DepthwiseConvSpec(factor=2),
            layout=WindowsSpec(counts=(1, 2)),
            adapt=LoraSpec(rank=4, bias=True),
            coords=CoordsSpec(origin="window", cell="index"),
        ),
        "global": BranchSpec(
            compress=DepthwiseConvSpec(factor=(3, 2)), adapt=LoraSpec(rank=4), coords=CoordsSpec(cell="index")
        ),
    }
    yield cls(branches=ultragen, fuse=TimeGateSpec(order=("global", ("local", "regional")))), site
    resized = {
        "local": BranchSpec(layout=WindowsSpec(counts=(2, 3), ragged="resize"), coords=CoordsSpec(origin="window")),
        "global": BranchSpec(
            compress=DepthwiseConvSpec(factor=2, ragged="resize"),
            adapt=LoraSpec(rank=2, bias=True, init="random", key_from="query"),
            coords=CoordsSpec(cell="index"),
        ),
    }
    yield (
        cls(
            branches=resized,
            fuse=TimeGateSpec(order=("local", "global"), per="head", init={"local": 0.7, "global": 0.3}),
        ),
        site,
    )
    rolled = {"near": BranchSpec(layout=WindowsSpec(size=(2, 3, 4)), shift=RollSpec())}
    yield cls(branches=rolled), site
    pair = {
        "near": BranchSpec(layout=WindowsSpec(counts=(2, 2, 3))),
        "far": BranchSpec(layout=StridedSpec(counts=(2, 2, 3))),
    }
    yield cls(branches=pair, fuse=WeightsSpec(weights={"near": 0.25, "far": 0.75}, learned=True)), site.at(layer=0)
    gated = {
        "own": BranchSpec(compress=AvgPoolSpec(factor=(2, 2, 2), lift="nearest"), adapt=ADAPT["own"]()),
        "fewer_keys": BranchSpec(compress=StrideSpec(factor=2, of="keys"), layout=WindowsSpec(counts=(1, 2, 2))),
    }
    image = Site(dim=20, heads=2, head_dim=8, grid=Grid(1, 6, 7), has_timestep=False)
    yield cls(branches=gated, fuse=TokenGateSpec(act="sigmoid")), image.at(grid=Grid(4, 5, 7))
    joint = {
        "near": BranchSpec(layout=WindowsSpec(counts=2), shift=RollSpec()),
        "coarse": BranchSpec(compress=AvgPoolSpec(factor=2, of="keys")),
    }
    yield cls(branches=joint, fuse=LseSpec()), image.at(layer=1, layers=2)
    yield cls(branches={"all": BranchSpec()}, fuse=TokenGateSpec(per="channel", act="none")), site


def module_name(branch: str) -> str:
    """A branch's name in the state dict: Python's keywords get an underscore (``global_``), for exporters write code."""
    return f"{branch}_" if keyword.iskeyword(branch) else branch


class BranchedAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: BranchedSpec, site: Site):
        super().__init__(spec, site)
        rows = spec.branches.items()
        self.branches = nn.ModuleDict({module_name(name): Branch(branch, site, spec.kernel) for name, branch in rows})
        self.fuse = spec.fuse.build(spec.names, site)

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        spec: Any = self.spec
        if call.extra is not None:
            refuse_segments(spec.name, call.extra)
        if call.key_valid is not None:
            # what stands in an invalid token must not leak through cells and lifts
            x = x.masked_fill(~call.key_valid.unsqueeze(-1), 0.0)
        z = x.unflatten(1, call.grid)  # (B, T, H, W, C)
        wanting = sum(not branch.compresses_queries for branch in spec.branches.values())
        private = wanting <= 1 and call.extra is None and not getattr(host, "shares_projections", False)
        shared = Shared(host, x, z, self.traced, private)
        outputs: dict[str, Tensor | Unlifted] = {}
        lse: dict[str, Tensor] = {}
        done: dict[Any, str] = {}
        for name in spec.names:
            branch = self.branches[module_name(name)]
            key = branch.identity(call.grid, self.traced)
            if key is not None and key in done:
                outputs[name] = outputs[done[key]]
                if spec.fuse.wants_lse:
                    lse[name] = lse[done[key]]
                continue
            if key is not None:
                done[key] = name
            extra = call.extra if not spec.fuse.wants_lse or name == spec.names[0] else None
            # (B, T, H, W, heads*D), or yet to be lifted to it
            fuse = spec.fuse
            outputs[name], found = branch(z, host, call, shared, extra, fuse.wants_lse, fuse.takes_unlifted)
            if found is not None:
                lse[name] = found
        y = self.fuse(outputs, z, call, lse)
        out = host.out(y.flatten(1, 3))
        if call.extra is None:
            return out
        k, v = shared.grid_keys()
        return out, attend_extra(call.extra, k, v, call.key_valid, spec.kernel)


BranchedSpec.module = BranchedAttention
