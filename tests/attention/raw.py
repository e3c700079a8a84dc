"""An attention on queries, keys and values as they are given: no projections, no norms, no rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ultrazoo.attention.block_sparse import BlockSparseAttention, BlockSparseSpec
from ultrazoo.attention.contract import Call
from ultrazoo.attention.standalone import reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Site


class GivenHost:
    """A host whose projections of (q, k, v) side by side are q, k and v."""

    def __init__(self, heads: int):
        self.heads_count = heads

    def project(self, x: Tensor, which: str) -> tuple[Tensor, ...]:
        assert which == "qkv"
        q, k, v = x.chunk(3, dim=-1)
        return q, k, v

    def heads(self, *raw: Tensor | None, **_: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if z is None else z.unflatten(-1, (self.heads_count, -1)) for z in raw[:3])

    def out(self, y: Tensor) -> Tensor:
        return y


def block_of(spec: AttentionSpec, heads: int, dim: int, tokens: int, grid: tuple[int, int, int] | None = None) -> Any:
    """The module of a spec that expands to `block_sparse`, in fp64, its parameters as they start."""
    site = Site(dim=heads * dim, heads=heads, head_dim=dim, grid=Grid(*(grid or (1, 1, tokens))))
    expanded = spec.expand(site)
    assert isinstance(expanded, BlockSparseSpec)
    module = expanded.build(site)
    assert isinstance(module, BlockSparseAttention)
    reset_parameters(module)
    return module.double()


def given(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, module: Any = None, grid: tuple[int, int, int] | None = None
) -> Tensor:
    """What `spec` makes of q, k, v (B, N, heads, D): (B, N, heads, D)."""
    heads, dim, tokens = q.shape[2], q.shape[3], q.shape[1]
    module = block_of(spec, heads, dim, tokens, grid) if module is None else module
    x = torch.cat([z.flatten(2) for z in (q, k, v)], dim=-1)
    y: Tensor = module(x, GivenHost(heads), Call(grid=grid or (1, 1, tokens)))
    return y.unflatten(-1, (heads, -1))


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of q, k, v (B, N, heads, D)."""
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def noise(name: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in fp64."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(name), dtype=torch.float64)
