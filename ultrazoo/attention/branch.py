"""One branch of branched attention: compress → project → lay out → attend → restore → lift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..grid import Grid
from ..ops import partition, pool
from ..ops.graphs import followed, longer, of_sizes
from ..ops.partition import AxisRule, Rectangle, axis_index
from ..ops.runs import AxisCut
from ..spec import Site
from .contract import Call, Extra, Host, Positions, grid_positions
from .geometry import Geometry, axis_positions, geometry
from .grouped import attend_cuts, attend_rules, slab_tokens
from .parts.adapt import LoraSpec, OwnSpec, SharedSpec, adapted, base_projections, own_projections
from .parts.compressors import LiftModule, Unlifted
from .parts.coords import CoordsSpec

if TYPE_CHECKING:
    from .branched import BranchSpec


class Shared:
    """What branches of one call share: the host's projections of the unchanged input, and its heads per coordinates.

    `private`: one branch at most wants them, so it may project piece by piece.
    """

    def __init__(self, host: Host, x: Tensor, z: Tensor, traced: bool, private: bool):
        self.host, self.x, self.z, self.traced, self.private = host, x, z, traced, private
        self._raw: dict[str, Tensor] = {}
        self._heads: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Raw q, k, v (B, N, width) of the input, all three projected at once."""
        if "k" not in self._raw:
            if "q" in self._raw:
                k, v = self.host.project(self.x, "k"), self.host.project(self.x, "v")
                assert isinstance(k, Tensor) and isinstance(v, Tensor)
                self._raw.update(k=k, v=v)
            else:
                q, k, v = self.host.project(self.x, "qkv")
                self._raw.update(q=q, k=k, v=v)
        return self._raw["q"], self._raw["k"], self._raw["v"]

    def query(self) -> Tensor:
        """Raw q (B, N, width) of the input alone."""
        if "q" not in self._raw:
            found = self.host.project(self.x, "q")
            assert isinstance(found, Tensor)
            self._raw["q"] = found
        return self._raw["q"]

    def heads(self, key: Any, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q, k, v (B, N, heads, D); `key` names the positions."""
        if key not in self._heads:
            q, k, v = self.host.heads(*self.raw(), positions)
            assert q is not None and k is not None and v is not None
            self._heads[key] = (q, k, v)
        return self._heads[key]

    def grid_keys(self) -> tuple[Tensor, Tensor]:
        """k and v (B, N, heads, D) at full resolution, in grid coordinates: what extra queries see."""
        _, k, v = self.heads("grid", grid_positions(self.z.shape[1:4], self.z.device))
        return k, v


class Branch(nn.Module):
    """``branch(z, host, call, shared, extra, lse, unlifted)``: (B, T, H, W, C) → (B, T, H, W, heads*D), or its `Unlifted` form
    where the caller takes that, and lse or None."""

    def __init__(self, spec: BranchSpec, site: Site, kernel: str):
        super().__init__()
        self.spec, self.site, self.kernel = spec, site, kernel
        self.compress = None if spec.compress is None else spec.compress.compressor(site)
        self.lift = LiftModule(spec.compress, site) if spec.compress is not None and spec.compresses_queries else None
        self.adapt = spec.adapt.build(site)

    def identity(self, grid: tuple[int, int, int], traced: bool) -> Any:
        """What makes two branches one computation: the same value for both. None: compute it in any case."""
        spec = self.spec
        if (
            traced
            or spec.compress is not None
            or not isinstance(spec.adapt, SharedSpec)
            or spec.layout.ragged != "exact"
        ):
            return None
        cuts = tuple(cut.canonical() for cut in spec.layout.cuts(Grid(*grid), self.site.layer, spec.shift))
        coords = spec.coords
        return (cuts, None if self.site.rope is None else (coords.origin, coords.rule))

    def forward(
        self,
        z: Tensor,
        host: Host,
        call: Call,
        shared: Shared,
        extra: Extra | None,
        lse: bool,
        unlifted: bool = False,
    ) -> tuple[Tensor | Unlifted, Tensor | None]:
        """`unlifted`: leave the lift to the caller, where it can be made frame by frame."""
        spec = self.spec
        traced = shared.traced
        place = None if traced else geometry(spec.compress, spec.layout, spec.shift, Grid(*call.grid), self.site.layer)
        valid = None if call.key_valid is None else call.key_valid.unflatten(1, call.grid)
        coarse = z if self.compress is None else self.compress(z, traced)  # (B, t, h, w, C)
        if valid is not None and spec.compress is not None:
            members = pool.cells(valid, spec.compress.cell, spec.compress.ragged, traced)
            first = spec.compress.reads == "first"
            valid = members[:, :, 0, :, 0, :, 0] if first else members.any(6).any(4).any(2)
        keys = coarse
        queries = z if spec.compress is not None and spec.compress.of == "keys" else coarse
        if place is not None and place.k_grid != place.coarse_k:
            keys = queries = pool.resize(coarse, place.k_grid)
        if place is not None and queries is keys and extra is None and not lse:
            slabs = self._slabs(queries, z, place, shared)
            if slabs:
                return self._back(self._by_slabs(queries, slabs, place, host, valid), place, call, unlifted), None
        q, k, v = self._heads(queries, keys, z, host, shared, place)
        q, k, v = q.unflatten(1, queries.shape[1:4]), k.unflatten(1, keys.shape[1:4]), v.unflatten(1, keys.shape[1:4])
        common: dict[str, Any] = {"extra": extra, "key_valid": valid, "lse": lse, "kernel": self.kernel}
        if place is None:
            rules = self._rules()
            y, found = attend_rules(q, k, v, rules, rules, same_grid=queries is keys, **common)
        else:
            y, found = attend_cuts(q, k, v, place.q_cuts, place.k_cuts, **common)
        return self._back(y.flatten(4), place, call, unlifted), found

    def _back(self, y: Tensor, place: Geometry | None, call: Call, unlifted: bool) -> Tensor | Unlifted:
        """(B, t, h, w, heads*D) as attended → (B, T, H, W, heads*D), or `Unlifted`."""
        if self.lift is None:
            return y if place is None else pool.resize(y, place.grid)
        if place is not None and self.lift.ragged == "exact":
            y = pool.resize(y, place.coarse_q)
        eager = place is not None and not torch.is_grad_enabled() and not followed()
        if unlifted and eager and pool.in_frames(y, self.lift.cell, call.grid):
            return Unlifted(self.lift, y, call.grid)
        return self.lift(y, call.grid, place is None)  # type: ignore[no-any-return]

    def _slabs(self, tokens: Tensor, z: Tensor, place: Geometry, shared: Shared) -> list[Rectangle]:
        """Blocks of windows to project and attend one after the other; none where all at once is as good.

        Without gradients nobody needs a branch's queries, keys and values as a whole, unless it shares them.
        """
        if tokens.requires_grad and torch.is_grad_enabled():
            return []
        strided = any(cut.stride > 1 for cut in place.q_cuts)
        if (tokens is z and not shared.private) or strided or torch.compiler.is_compiling():
            return []
        most = slab_tokens(tokens.device, tokens.shape[0] * self.site.width * tokens.element_size())
        cuts, _ = partition.slabs(place.q_cuts, place.q_cuts, most)
        return [] if cuts == place.q_cuts else partition.rectangles(cuts)

    def _by_slabs(
        self, tokens: Tensor, slabs: list[Rectangle], place: Geometry, host: Host, valid: Tensor | None
    ) -> Tensor:
        """(B, t, h, w, C) → (B, t, h, w, heads*D), block by block."""
        coords = self.spec.coords
        extent = None if coords.rule == "none" else self._extent(tokens, tokens, place)
        at = self._positions(tokens, place, extent, compressed=self.compress is not None, of_keys=True)
        y = tokens.new_empty(*tokens.shape[:4], self.site.inner)
        for block in slabs:
            t, h, w = (slice(span.start, span.stop) for span in block)
            part = tokens[:, t, h, w]
            raw = self._private(part.flatten(1, 3), host)
            q, k, v = _three(host.heads(*raw, at._replace(t=at.t[t], h=at.h[h], w=at.w[w])))
            cuts = tuple(AxisCut(((span.count, span.size),)) for span in block)
            known = None if valid is None else valid[:, t, h, w]
            out, _ = attend_cuts(
                *(u.unflatten(1, part.shape[1:4]) for u in (q, k, v)), cuts, cuts, key_valid=known, kernel=self.kernel
            )
            y[:, t, h, w] = out.flatten(4)
        return y

    def _private(self, x: Tensor, host: Host) -> tuple[Tensor, Tensor, Tensor]:
        """Raw q, k, v (B, n, width) of x (B, n, C), shared with nobody."""
        if isinstance(self.spec.adapt, OwnSpec):
            return own_projections(self.adapt, x, x)
        return adapted(self.adapt, base_projections(self.spec.adapt, host, x), x, x)

    def _rules(self) -> tuple[AxisRule, AxisRule, AxisRule]:
        return self.spec.layout.rules(self.site.layer, self.spec.shift)

    def _heads(
        self, queries: Tensor, keys: Tensor, z: Tensor, host: Host, shared: Shared, place: Geometry | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q (B, n, heads, D) and k, v (B, m, heads, D)."""
        spec = self.spec
        extent = None if spec.coords.rule == "none" else self._extent(queries, keys, place)
        at = self._positions(keys, place, extent, compressed=self.compress is not None, of_keys=True)
        if queries is z and keys is z and isinstance(spec.adapt, SharedSpec):
            in_grid = spec.coords.origin == "grid" and spec.coords.rule == "none"
            return shared.heads("grid" if in_grid else id(self), at)
        raw = self._raw(queries, keys, z, host, shared)
        if queries is keys:
            return _three(host.heads(*raw, at))
        return _three(host.heads(*raw, self._positions(queries, place, extent, compressed=False, of_keys=False), at))

    def _raw(
        self, queries: Tensor, keys: Tensor, z: Tensor, host: Host, shared: Shared
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw q (B, n, width) and k, v (B, m, width)."""
        adapt = self.spec.adapt
        flat = keys.flatten(1, 3)
        from_x = flat if queries is keys else queries.flatten(1, 3)
        if isinstance(adapt, OwnSpec):
            return own_projections(self.adapt, from_x, flat)
        crossed = isinstance(adapt, LoraSpec) and adapt.key_from == "query"
        if queries is z and keys is z:
            q, k, v = shared.raw()
            base = (q, q if crossed else k, v)
        elif queries is keys:
            base = base_projections(adapt, host, flat)
        else:
            k, v = host.project(flat, "q" if crossed else "k"), host.project(flat, "v")
            assert isinstance(k, Tensor) and isinstance(v, Tensor)
            base = (shared.query(), k, v)
        return adapted(self.adapt, base, from_x, flat)

    def _extent(self, queries: Tensor, keys: Tensor, place: Geometry | None) -> tuple[int, int, int]:
        """Per axis, how many positions a window spans: of queries or keys, whichever are more. The same for both."""
        coords = self.spec.coords
        cell = (1, 1, 1) if self.spec.compress is None or coords.cell == "index" else self.spec.compress.cell
        q_cell = (1, 1, 1) if queries is not keys else cell
        out = []
        for axis in range(3):
            q, k = queries.shape[1 + axis], keys.shape[1 + axis]
            if coords.origin == "window":
                assert place is not None
                q, k = place.q_cuts[axis].reach, place.k_cuts[axis].reach
            out.append(longer(q * q_cell[axis], k * cell[axis]))
        return (out[0], out[1], out[2])

    def _positions(
        self,
        tokens: Tensor,
        place: Geometry | None,
        extent: tuple[int, int, int] | None,
        compressed: bool,
        of_keys: bool,
    ) -> Positions:
        """Coordinates of `tokens` (B, t, h, w, C) under the branch's rules."""
        coords, size = self.spec.coords, tokens.shape[1:4]
        cell = self.spec.compress.cell if compressed and self.spec.compress is not None else (1, 1, 1)
        axes = []
        for axis in range(3):
            if place is None:
                axes.append(_traced_axis(coords, self._rules()[axis], size[axis], cell[axis], tokens.device))
                continue
            cut: AxisCut = (place.k_cuts if of_keys else place.q_cuts)[axis]
            values = axis_positions(cut, cell[axis], coords.origin, coords.cell)
            axes.append(torch.tensor(values, dtype=torch.float32, device=tokens.device))
        return Positions(axes[0], axes[1], axes[2], coords.rule, extent)


@of_sizes
def _traced_axis(coords: CoordsSpec, rule: AxisRule, length: int, factor: int, device: torch.device) -> Tensor:
    """Coordinates of one axis of `length` tokens, each a cell of `factor` tokens; `length` may be symbolic."""
    places = torch.arange(length, device=device).to(torch.float32)
    if coords.cell == "centre":
        places = places * factor + (factor - 1) / 2
    if coords.origin == "window":
        index = axis_index(rule, length, device)
        if index.gather is None:
            return places - places[:1]
        assert index.window is not None
        places = places - places[index.gather[:, 0][index.window]]
    return places


def _three(found: tuple[Tensor | None, Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = found
    assert q is not None and k is not None and v is not None
    return q, k, v
