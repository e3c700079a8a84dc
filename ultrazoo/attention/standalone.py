"""An attention on its own, with a plain host: for experiments, tests and other people's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Problem, SiteError, UsageError
from ..grid import Grid, as_grid
from ..ops import rope as rotary
from ..ops.graphs import followed
from ..ops.init import Constant, Copy, initial_tensor, value_of
from ..ops.norm import rms_norm
from ..ops.seeds import generator_for
from ..options import parse_part
from ..spec import AttentionSpec, Rope, Site
from .checks import same_dtype, shown
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
        if not followed():
            self._check(x)
        if which == "qkv":
            return self.q(x), self.k(x), self.v(x)
        return getattr(self, which)(x)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.site.dim:
            raise UsageError(f"x is (B, N, C) with C = {self.site.dim}, got {tuple(x.shape)}")
        own = self.q.weight.dtype
        if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise UsageError(
                f"x is {shown(x)}, the module's parameters are {str(own).removeprefix('torch.')}: convert one of them with "
                f".to(dtype), or run under autocast"
            )

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

    A grid of two numbers is an image's. With `extra`, ``(y, y_extra)`` as in `attention.contract.Attention`. Raises SiteError
    at a size that does not work, UsageError for tensors that do not fit.
    """

    def __init__(self, spec: AttentionSpec, site: Site, host: nn.Module | None = None):
        super().__init__()
        self.spec, self.site = spec, site
        self.host = PlainHost(site) if host is None else host
        self._expanded = spec.expand(site)
        self.attention = self._expanded.build(site)
        self._checked = site.grid

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int],
        timestep: Tensor | None = None,
        extra: Extra | None = None,
        key_valid: Tensor | None = None,
    ) -> Any:
        if not followed():
            grid = self._checked_grid(grid)
            if extra is not None and isinstance(self.host, PlainHost):
                same_dtype(extra, self.host.k.weight)
        t, h, w = grid if len(grid) == 3 else (1, *grid)
        call = Call(grid=(t, h, w), timestep=timestep, extra=extra, key_valid=key_valid)
        return self.attention(x, self.host, call)

    def _checked_grid(self, grid: Sequence[int]) -> Grid:
        """(T, H, W) of a grid at which the design works, from two numbers or three."""
        sizes = _grid(grid)
        if self._checked != sizes:
            site = self.site.at(grid=sizes)
            expanded = self.spec.expand(site)
            found = expanded.problems(site)
            if not found and expanded != self._expanded:
                found = [
                    Problem("", "the design has other parts at this grid", "create the module with grid=(T, H, W)")
                ]
            if found:
                raise SiteError(f"attention {self.spec.name!r} at grid {sizes}", found)
            self._checked = sizes
        return sizes


def create_attention(
    name: str,
    *,
    dim: int,
    heads: int,
    head_dim: int | None = None,
    layer: int = 0,
    layers: int = 1,
    rope: Rope | Any = None,
    qk_norm: bool = False,
    seed: int = 0,
    grid: Sequence[int] | None = None,
    **options: Any,
) -> Standalone:
    """A registered attention with its own plain host: ``module(x, grid, timestep=None)``.

    `options` are those of a recipe's node; a `rope` that is no `Rope` is one of them (`linear` has it), and the host has no
    rotary embedding then. head_dim: None means ``dim // heads``. `grid` (T, H, W) or (H, W): options are
    checked there at once; None: they are checked at the grid of each call, and here only for what no grid allows. Raises
    SiteError with every problem.
    """
    if rope is not None and not isinstance(rope, Rope):
        options, rope = {**options, "rope": rope}, None
    site = _site(name, dim=dim, heads=heads, head_dim=head_dim, layer=layer, layers=layers, rope=rope)
    site = site.at(qk_norm=bool(qk_norm))
    spec, found = parse_part("attention", {"name": name, **options})
    if found or spec is None:
        raise SiteError(f"attention {name!r}", found)
    if grid is not None:
        site = site.at(grid=_grid(grid))
        if problems := _problems(spec, site):
            raise SiteError(f"attention {name!r} at grid {site.grid}", problems)
    else:
        site = _somewhere(spec, site)
    module = Standalone(spec, site)
    reset_parameters(module, seed)
    return module


PROBES = (
    Grid(32, 128, 128),
    Grid(21, 68, 120),
    Grid(1, 128, 128),
    *(Grid(n, n, n) for n in (32, 16, 8, 4, 2)),
    Grid(64, 512, 512),
)
"""Videos and images, large and small: what none of them allows, an option forbids by itself."""


def _somewhere(spec: AttentionSpec, site: Site) -> Site:
    """`site` at a grid where `spec` works; raises SiteError with the options that are wrong at every grid."""
    shown: list[Problem] = []
    for at, grid in enumerate(PROBES):
        found = _problems(spec, site.at(grid=grid))
        if not found:
            return site.at(grid=grid)
        # the numbers in a rule may be those of the grid: the option is what stays wrong
        shown = found if at == 0 else [one for one in shown if any(one.path == other.path for other in found)]
    if shown:
        raise SiteError(f"attention {spec.name!r}", shown)
    where = f"attention {spec.name!r} at grid {PROBES[0]}, and other problems at others (give grid=(T, H, W) to choose)"
    raise SiteError(where, _problems(spec, site.at(grid=PROBES[0])))


def _problems(spec: AttentionSpec, site: Site) -> list[Problem]:
    return spec.problems(site) or spec.expand(site).problems(site)


def _grid(grid: Sequence[int]) -> Grid:
    try:
        return as_grid(tuple(grid))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a grid is (H, W) or (T, H, W) of positive integers, got {grid!r}") from error


def _site(
    name: str, *, dim: int, heads: int, head_dim: int | None, layer: int, layers: int, rope: Rope | None = None
) -> Site:
    """The place of an attention on its own; raises SiteError with everything that makes none."""
    found = []
    counts = {"dim": dim, "heads": heads, "layers": layers} | ({} if head_dim is None else {"head_dim": head_dim})
    for path, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found.append(Problem(path, f"got {value!r}", "a whole number, at least 1"))
    if not found and (not isinstance(layer, int) or not 0 <= layer < layers):
        found.append(
            Problem("layer", f"layer {layer} does not exist", f"layers are 0-{layers - 1}; say how many with layers")
        )
    if not found and head_dim is None and dim % heads:
        rule = f"{heads} heads do not divide dim {dim}"
        found.append(Problem("heads", rule, "give head_dim, or another number of heads"))
    size = dim // heads if head_dim is None and not found else head_dim or 0
    if not found and rope is not None and (any(n % 2 or n < 0 for n in rope.axes) or sum(rope.axes) > size):
        rule = f"axes {rope.axes} of a head of {size} channels"
        found.append(Problem("rope", rule, f"three even numbers that add up to at most {size}"))
    if found:
        raise SiteError(f"attention {name!r}", found)
    return Site(dim=dim, heads=heads, head_dim=size, layer=layer, layers=layers, rope=rope)


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


MOST_PAIRS = 1 << 34
"""Most pairs that `visible` answers at once: a byte each, and a few times that while they are made."""


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
    """Which tokens each query's output may depend on in attention `name`: bool (1 or heads, queries, N).

    `queries` are token indices, None means all. Raises SiteError for options that do not work at the grid, UsageError for
    queries that are no tokens of it.
    """
    # influence does not depend on widths: take some that no option (a LoRA's rank) exceeds
    width = 1 << 14
    dim = heads * width if isinstance(heads, int) else width
    site = _site(name, dim=max(dim, 1), heads=heads, head_dim=width, layer=layer, layers=layers)
    site = site.at(grid=_grid(grid), rope=Rope(axes=(4, 2, 2)))
    spec, found = parse_part("attention", {"name": name, **options})
    if found or spec is None:
        raise SiteError(f"attention {name!r}", found)
    if found := _problems(spec, site):
        raise SiteError(f"attention {name!r} at grid {site.grid}", found)
    if isinstance(queries, int | np.integer):
        raise UsageError(f"queries are token indices in a list, got {queries!r}: write [{queries}]")
    rows = site.tokens if queries is None else len(queries)
    if rows * site.tokens > MOST_PAIRS:
        raise UsageError(
            f"{rows} queries of {site.tokens} tokens are {rows * site.tokens / 2**30:.3g} GiB: give some tokens as queries"
        )
    if queries is not None:
        wrong = [
            q for q in queries if not isinstance(q, int | np.integer) or isinstance(q, bool) or not 0 <= q < site.tokens
        ]
        if wrong:
            raise UsageError(f"queries are token indices 0-{site.tokens - 1} of grid {site.grid}, got {wrong[0]!r}")
    return spec.expand(site).visible(site, queries)  # type: ignore[no-any-return]
