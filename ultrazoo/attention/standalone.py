"""An attention on its own, with a plain host: for experiments, tests and other people's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem, SiteError
from ..grid import Grid, as_grid
from ..ops import rope as rotary
from ..ops.init import Constant, Copy, initial_tensor, value_of
from ..ops.norm import rms_norm
from ..ops.seeds import generator_for
from ..options import parse_part
from ..spec import AttentionSpec, Rope, Site
from .contract import Call, Extra, Positions


class PlainHost(nn.Module):
    """Projections, optional RMS norms of q and k over all heads, optional rotary embedding, output projection."""

    def __init__(self, site: Site, eps: float = 1e-6):
        super().__init__()
        self.site, self.eps = site, eps
        self.q = nn.Linear(site.dim, site.width)
        self.k = nn.Linear(site.dim, site.width)
        self.v = nn.Linear(site.dim, site.width)
        self.o = nn.Linear(site.width, site.dim)
        self.norm_q = nn.Parameter(torch.ones(site.width)) if site.qk_norm else None
        self.norm_k = nn.Parameter(torch.ones(site.width)) if site.qk_norm else None

    def initial_values(self) -> dict[str, Any]:
        return {"norm_q": Constant(1.0), "norm_k": Constant(1.0)}

    def project(self, x: Tensor, which: str) -> Any:
        if which == "qkv":
            return self.q(x), self.k(x), self.v(x)
        return getattr(self, which)(x)

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        q = self._head(q, self.norm_q, positions)
        k = self._head(k, self.norm_k, key_positions or positions)
        return q, k, self._head(v, None, None)

    def _head(self, z: Tensor | None, weight: Tensor | None, positions: Positions | None) -> Tensor | None:
        if z is None:
            return None

        def norm(raw: Tensor) -> Tensor:
            return raw if weight is None else rms_norm(raw, weight, self.eps)

        if positions is not None and self.site.rope is not None:
            return rotary.normed_rotated(z, norm, self.site.head_dim, positions, self.site.rope)
        return norm(z).unflatten(-1, (-1, self.site.head_dim))

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        return z if self.site.rope is None else rotary.rotate(z, positions, self.site.rope)

    def out(self, y: Tensor) -> Tensor:
        return self.o(y)  # type: ignore[no-any-return]


class Standalone(nn.Module):
    """``module(x, grid, timestep=None, extra=None)``: (B, N, C) over grid (T, H, W) → (B, N, C).

    With `extra`, ``(y, y_extra)`` as in `attention.contract.Attention`. Raises SiteError at a size that does not work.
    """

    def __init__(self, spec: AttentionSpec, site: Site, host: nn.Module | None = None):
        super().__init__()
        self.spec, self.site = spec, site
        self.host = PlainHost(site) if host is None else host
        self.attention = spec.expand(site).build(site)
        self._checked: tuple[int, int, int] | None = tuple(site.grid)  # type: ignore[assignment]

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        timestep: Tensor | None = None,
        extra: Extra | None = None,
        key_valid: Tensor | None = None,
    ) -> Any:
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._check(x, grid)
        call = Call(grid=(grid[0], grid[1], grid[2]), timestep=timestep, extra=extra, key_valid=key_valid)
        return self.attention(x, self.host, call)

    def _check(self, x: Tensor, grid: Sequence[int]) -> None:
        sizes = as_grid(tuple(grid))
        if x.dim() != 3 or x.shape[1] != sizes.tokens or x.shape[2] != self.site.dim:
            raise ValueError(
                f"x is (B, N, C) with N = {sizes.tokens} for grid {sizes} and C = {self.site.dim}, got {tuple(x.shape)}"
            )
        if self._checked != sizes:
            expanded = self.spec.expand(self.site.at(grid=sizes))
            found = expanded.problems(self.site.at(grid=sizes))
            if found:
                raise SiteError(f"attention {self.spec.name!r} at grid {sizes}", found)
            self._checked = (sizes.t, sizes.h, sizes.w)


def create_attention(
    name: str,
    *,
    dim: int,
    heads: int,
    head_dim: int | None = None,
    layer: int = 0,
    layers: int = 1,
    rope: Rope | None = None,
    qk_norm: bool = False,
    seed: int = 0,
    **options: Any,
) -> Standalone:
    """A registered attention with its own plain host: ``module(x, grid, timestep=None)``.

    `options` are those of a recipe's node. head_dim: None means ``dim // heads``. Raises SiteError with every problem.
    """
    if head_dim is None:
        if dim % heads:
            raise SiteError(f"attention {name!r}", _divide(dim, heads))
        head_dim = dim // heads
    spec, found = parse_part("attention", {"name": name, **options})
    if found or spec is None:
        raise SiteError(f"attention {name!r}", found)
    # sizes come with each call: checked there
    site = Site(dim=dim, heads=heads, head_dim=head_dim, layer=layer, layers=layers, rope=rope, qk_norm=bool(qk_norm))
    large = site.at(grid=Grid(64, 512, 512))
    problems = spec.problems(large) or spec.expand(large).problems(large)
    if problems:
        raise SiteError(f"attention {name!r}", problems)
    module = Standalone(spec, large)
    reset_parameters(module, seed)
    return module


def _divide(dim: int, heads: int) -> list[Problem]:
    return [Problem("heads", f"{heads} heads do not divide dim {dim}", "give head_dim, or another number of heads")]


def reset_parameters(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter its initial value, each from a generator seeded by (seed, name)."""
    owners = dict(module.named_modules())
    copies = []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            path, _, own = name.rpartition(".")
            value = value_of(owners[path], own)
            if isinstance(value, Copy):
                copies.append((parameter, value.source))
                continue
            made = initial_tensor(owners[path], own, parameter.shape, generator_for(seed, name))
            parameter.copy_(made)
        for parameter, source in copies:
            which, _, part = source.partition(".")
            parameter.copy_(getattr(getattr(owners["host"], which), part))


def visible(
    name: str,
    grid: Sequence[int],
    *,
    layer: int = 0,
    layers: int = 1,
    heads: int = 1,
    queries: Sequence[int] | None = None,
    **options: Any,
) -> np.ndarray:
    """Which tokens each query's output may depend on in attention `name`: bool (1 or heads, queries, N)."""
    spec, found = parse_part("attention", {"name": name, **options})
    if found or spec is None:
        raise SiteError(f"attention {name!r}", found)
    # influence does not depend on widths: take some that no option (a LoRA's rank) exceeds
    width = 1 << 14
    site = Site(dim=heads * width, heads=heads, head_dim=width, layer=layer, layers=layers, grid=as_grid(tuple(grid)))
    site = site.at(rope=Rope(axes=(4, 2, 2)))
    expanded = spec.expand(site)
    found = spec.problems(site) or expanded.problems(site)
    if found:
        raise SiteError(f"attention {name!r} at grid {site.grid}", found)
    return expanded.visible(site, queries)  # type: ignore[no-any-return]
