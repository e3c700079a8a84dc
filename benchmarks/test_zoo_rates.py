"""How near every sparse attention comes to the time that its share of full attention would take.

Grid (8, 32, 32), 512 channels, 8 heads, fp32, two threads, forward, the attention core: the host's projections are the stored
queries, keys and values, its output the identity. Bound: ``t <= c * share * t_full + t_move``. `t_full` is torch's SDPA on the
same q, k, v; `share` the visited pairs over N^2 (what data decides is counted on this data); `t_move` a copy of q, k, v and
the output, and the selection by itself. c is 1.7 with whatever kernel is the fastest here, 2.8 without a compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gates import examples_against_oracle
from benchmarks.measure import interleaved
from benchmarks.rows import Row
from benchmarks.test_zoo_memory import spec_of
from ultrazoo import kernels, registry
from ultrazoo.attention.block_sparse import BlockSparseAttention, _place
from ultrazoo.attention.contract import Call, Positions
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Rope, Site

RESULTS_NAME = "zoo"
GRID = Grid(8, 32, 32)
HEADS, HEAD_DIM = 8, 64
ROUNDS = 9
SITE = Site(
    dim=HEADS * HEAD_DIM,
    heads=HEADS,
    head_dim=HEAD_DIM,
    layer=5,
    layers=30,
    grid=GRID,
    rope=Rope(axes=(24, 20, 20)),
)
SMALLEST_SHARE = 0.05
COMPILED, PLAIN = 1.7, 2.8


def _by_head(z: Tensor) -> Tensor:
    """(1, N, heads*D) → (1, N, heads, D)."""
    return z.view(*z.shape[:-1], -1, HEAD_DIM)


class StoredHost:
    """A host without arithmetic: its projections are given tensors (1, N, heads*D), or what it is asked to project."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.q, self.k, self.v = q, k, v

    def project(self, x: Tensor, which: str) -> Any:
        if which == "qkv":
            return (self.q, self.k, self.v) if x.shape == self.q.shape else (x, x, x)
        return getattr(self, which) if x.shape == self.q.shape else x

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> Any:
        return tuple(None if z is None else _by_head(z) for z in (q, k, v))

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        return z

    def out(self, y: Tensor) -> Tensor:
        return y


def sparse_names() -> list[str]:
    """Built-in attentions whose pairs are fewer than all and go through the kernel door."""
    found = []
    for row in registry.entries("attention"):
        if not row.builtin or row.name in ("by_head", "full", "original"):
            continue
        spec = spec_of(row.name).expand(SITE)
        if spec.traits().softmax and spec.cost(SITE).pairs < GRID.tokens**2:
            found.append(row.name)
    return found


def with_kernel(spec: AttentionSpec, kernel: str) -> AttentionSpec:
    """The same design on the kernel of that name."""
    return dataclasses.replace(spec, kernel=kernel)  # type: ignore[call-arg]


def measured(spec: AttentionSpec) -> dict[str, Any]:
    """Times of one design on random data, interleaved with SDPA and the copies."""
    torch.manual_seed(0)
    held = Standalone(spec, SITE)
    # what memory holds before that makes sums infinite, and slow
    reset_parameters(held)
    block = held.attention.eval()
    q, k, v = (torch.randn(1, GRID.tokens, SITE.dim) for _ in range(3))
    host, call = StoredHost(q, k, v), Call(grid=(GRID.t, GRID.h, GRID.w), timestep=torch.tensor([500.0]))
    heads = [_by_head(z).transpose(1, 2).contiguous() for z in (q, k, v)]
    into = [torch.empty_like(q) for _ in range(4)]

    def copies() -> None:
        for source, target in zip((q, k, v, q), into, strict=True):
            target.copy_(source)

    calls: dict[str, Callable[[], object]] = {
        "full": lambda: F.scaled_dot_product_attention(heads[0], heads[1], heads[2]),
        "move": copies,
        "design": lambda: block(q, host, call),
    }
    if isinstance(block, BlockSparseAttention) and spec.selector.softness is None:  # type: ignore[attr-defined]
        calls["select"] = lambda: _select(block, q, call)
    with torch.inference_mode():
        with kernels.record() as runs:
            answer = block(q, host, call)
        assert answer.isfinite().all()
        share = sum(run.pairs for run in runs) / (GRID.tokens**2 * HEADS)
        times = interleaved(calls, rounds=ROUNDS, warmup=2)
    full, move = times["full"].median_s, times["move"].median_s
    select = times["select"].median_s if "select" in times else 0.0
    design = times["design"].median_s
    return {
        "share": share,
        "full_s": full,
        "design_s": design,
        "move_s": move,
        "select_s": select,
        "factor": (design - move - select) / (share * full),
        "spread": times["design"].spread,
        "kernel": " + ".join(sorted({run.kernel for run in runs})),
    }


def _select(block: Any, q: Tensor, call: Call) -> object:
    """Everything up to the map of blocks, consumed as a kernel does."""
    place = _place(block.spec.order, GRID, ())
    z = _by_head(q)
    scene = block._scene(q, z, z, z, call, place)
    block_map = block._map(scene)
    return [block_map.rows(lo, hi) for lo, hi in block_map.chunks()]


def _row(name: str, case: str, spec: AttentionSpec, bound: float, command: str) -> Row:
    error = examples_against_oracle(name)
    found = measured(spec)
    kernel = found.pop("kernel")
    numbers = {key: round(value, 4) for key, value in found.items()}
    counts = numbers["share"] > SMALLEST_SHARE
    target = f"factor at most {bound}" if counts else f"none: a share up to {SMALLEST_SHARE}"
    met = numbers["factor"] <= bound if counts else None
    return Row(
        case, name, "float32", f"oracle fp64, its examples: {error:.1e}", numbers, command, target, met, kernel=kernel
    )


@pytest.mark.parametrize("name", sparse_names())
def test_time_beside_the_visited_share(name: str, record: Callable[[Row], None], command: str) -> None:
    row = _row(name, f"time of {name} at 8x32x32, forward", spec_of(name).expand(SITE), PLAIN, command)
    record(row)
    assert 0 < float(row.numbers["share"]) < 1


@pytest.mark.parametrize("name", ["block_sparse", "radial", "sparge2", "subblock"])
def test_time_compiled(name: str, record: Callable[[Row], None], command: str) -> None:
    spec = with_kernel(spec_of(name).expand(SITE), "flex")
    row = _row(name, f"time of {name} at 8x32x32, forward, compiled", spec, COMPILED, command)
    record(row)
    assert "flex" in row.kernel
