"""How near every sparse attention comes to the time that its share of full attention would take.

Grid (8, 32, 32), 512 channels, 8 heads, fp32, two threads, forward, the attention core: the host's projections are the stored
queries, keys and values, its output the identity. Bound: ``t <= c * share * t_full + t_move``. `t_full` is torch's SDPA on the
same q, k, v; `share` the visited pairs over N^2 (what data decides is counted on this data); `t_move` a copy of q, k, v and
the output, and the selection by itself. c is 1.7 with the compiled kernel, 2.8 without a compiler. A design's own projections
(`project_s`: the gate of video_sparse, q, k and v over time of divided, ...) are timed by themselves and taken off, for the
host's are no part of the core either; `factor_all` is the same ratio with them in it. Every ratio is the median of those of the
rounds, in each of which all are timed one after the other; `factor_best` is that of the fastest run of each, which tells how much
of the median other programs of the machine have in it. glibc keeps what is freed (`keep_freed_memory`), for full attention as
for the designs.

On a GPU: bf16, the head sizes of Wan 1.3B and of a wide layer, up to 171 360 tokens; `t_full` is the fastest of torch's dense kernels
there, the selection counts as the design's own, and c is 1.05 for designs whose pairs follow from the size and 1.3 for those that
choose by the data (``make gpu-test ARGS='-k time_on_a_gpu'``).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gates import examples_against_oracle
from benchmarks.measure import Timing, interleaved, keep_freed_memory
from benchmarks.rows import Row
from benchmarks.test_zoo_memory import spec_of
from ultrazoo import kernels, registry
from ultrazoo.attention.block_sparse import BlockSparseAttention, _place
from ultrazoo.attention.contract import Call, Positions
from ultrazoo.attention.sparse_videogen import SparseVideoGenAttention
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.ops.blocks import even_blocks
from ultrazoo.ops.orders import columns
from ultrazoo.spec import AttentionSpec, Rope, Site

RESULTS_NAME = "zoo"
GRID = Grid(8, 32, 32)
HEADS, HEAD_DIM = 8, 64
ROUNDS = 15
PARTS = ("move", "select", "project")
"""Timed by themselves: what a design spends before its attention, where it has such."""
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
FIXED_ON_GPU, CHOSEN_ON_GPU = 1.05, 1.3
GPU_GRIDS = {"37.8k": Grid(21, 30, 60), "73.5k": Grid(21, 50, 70), "171k": Grid(21, 68, 120)}
GPU_HEADS = (12, 56)
GPU_HEAD_DIM = 128


@pytest.fixture(scope="module", autouse=True)
def _allocator() -> None:
    keep_freed_memory()


def _by_head(z: Tensor, head_dim: int) -> Tensor:
    """(1, N, heads*D) → (1, N, heads, D)."""
    return z.view(*z.shape[:-1], -1, head_dim)


class StoredHost:
    """A host without arithmetic: its projections are given tensors (1, N, heads*D), or what it is asked to project."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, head_dim: int):
        self.q, self.k, self.v, self.head_dim = q, k, v, head_dim

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
        return tuple(None if z is None else _by_head(z, self.head_dim) for z in (q, k, v))

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


def measured(
    spec: AttentionSpec, site: Site = SITE, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Times of one design on random data, interleaved with dense attention and the copies."""
    torch.manual_seed(0)
    held = Standalone(spec, site)
    # what memory holds before that makes sums infinite, and slow
    reset_parameters(held)
    block = held.attention.to(device, dtype).eval()
    q, k, v = (torch.randn(1, site.tokens, site.dim, device=device, dtype=dtype) for _ in range(3))
    grid = (site.grid.t, site.grid.h, site.grid.w)
    host, call = StoredHost(q, k, v, site.head_dim), Call(grid=grid, timestep=torch.tensor([500.0], device=device))
    heads = [_by_head(z, site.head_dim).transpose(1, 2).contiguous() for z in (q, k, v)]
    into = [torch.empty_like(q) for _ in range(4)]

    def copies() -> None:
        for source, target in zip((q, k, v, q), into, strict=True):
            target.copy_(source)

    calls: dict[str, Callable[[], object]] = {
        **_dense_calls(heads),
        "move": copies,
        "design": lambda: block(q, host, call),
    }
    if isinstance(block, BlockSparseAttention) and spec.selector.softness is None:  # type: ignore[attr-defined]
        calls["select"] = lambda: _select(block, q, call)
    if isinstance(block, SparseVideoGenAttention):
        calls["select"] = lambda: _orders(block, q, k, v, call)
    if linears := _own_linears(block, q, host, call):
        calls["project"] = lambda: [linear(x) for linear, x in linears]
    with torch.inference_mode():
        with kernels.record() as runs:
            answer = block(q, host, call)
        assert answer.isfinite().all()
        share = sum(run.pairs for run in runs) / (site.tokens**2 * site.heads)
        times = interleaved({name: _finished(call, device) for name, call in calls.items()}, rounds=ROUNDS, warmup=2)
    dense = min((name for name in times if name.startswith("full")), key=lambda name: times[name].median_s)
    # on a GPU the selection is part of what is asked
    apart = ("move", "select") if device == "cpu" else ("move",)
    return {
        "share": share,
        **{f"{name}_s": times[name].median_s if name in times else 0.0 for name in ("design", *PARTS)},
        "full_s": times[dense].median_s,
        "factor": statistics.median(_factors(times, dense, (*apart, "project"), share)),
        "factor_best": min(_factors(times, dense, (*apart, "project"), share, fastest=True)),
        "factor_all": statistics.median(_factors(times, dense, apart, share)),
        "spread": times["design"].spread,
        "kernel": " + ".join(sorted({run.kernel for run in runs})) + ("" if dense == "full" else f" beside {dense}"),
    }


def _factors(
    times: Mapping[str, Timing], dense: str, apart: Sequence[str], share: float, fastest: bool = False
) -> list[float]:
    """Every round's (design - apart) / (share * dense), or that of the fastest run of each."""
    found = {name: [min(z.samples_s)] if fastest else z.samples_s for name, z in times.items()}
    less = [found[name] for name in apart if name in found]
    rounds = zip(found["design"], found[dense], *less, strict=True)
    return [(design - sum(rest)) / (share * full) for design, full, *rest in rounds]


def _dense_calls(heads: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Full attention on q, k, v (1, heads, N, D): torch's choice on a CPU, each fused kernel that runs on a GPU."""
    if heads[0].device.type == "cpu":
        return {"full": lambda: F.scaled_dot_product_attention(*heads)}
    found: dict[str, Callable[[], object]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads)

        try:
            dense()
        except RuntimeError:
            # not in this build, or not for these inputs
            continue
        found[f"full, {backend.name.lower()}"] = dense
    return found


def _finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, until its work is done."""
    if device == "cpu":
        return call

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    return finished


def _select(block: Any, q: Tensor, call: Call) -> object:
    """Everything up to the map of blocks, consumed as a kernel does."""
    place = _place(block.spec.order, Grid(*call.grid), ())
    z = _by_head(q, block.site.head_dim)
    scene = block._scene(q, z, z, z, call, place)
    block_map = block._map(scene)
    return [block_map.rows(lo, hi) for lo, hi in block_map.chunks()]


def _orders(block: SparseVideoGenAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> object:
    """Which of two orders suits each head, from a sample of rows."""
    spec: Any = block.spec
    grid = Grid(*call.grid)
    heads = [_by_head(z, block.site.head_dim).transpose(1, 2) for z in (q, k, v)]
    order = torch.as_tensor(columns(grid, 1)[0], device=q.device)
    return block._choose(*heads, None, grid, even_blocks(grid.tokens, spec.block), order)


def _own_linears(
    block: torch.nn.Module, x: Tensor, host: StoredHost, call: Call
) -> list[tuple[torch.nn.Module, Tensor]]:
    """The linear layers of a design and what one call gives them."""
    found: list[tuple[torch.nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, given, _: found.append((module, given[0].clone())))
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        block(x, host, call)
    for hook in hooks:
        hook.remove()
    return found


def _row(name: str, case: str, found: dict[str, Any], dtype: str, bound: float, command: str) -> Row:
    error = examples_against_oracle(name)
    kernel = found.pop("kernel")
    numbers = {key: round(value, 4) for key, value in found.items()}
    counts = numbers["share"] > SMALLEST_SHARE
    target = f"factor at most {bound}" if counts else f"none: a share up to {SMALLEST_SHARE}"
    met = numbers["factor"] <= bound if counts else None
    return Row(
        case, name, dtype, f"oracle fp64, its examples: {error:.1e}", numbers, command, target, met, kernel=kernel
    )


@pytest.mark.parametrize("name", sparse_names())
def test_time_beside_the_visited_share(name: str, record: Callable[[Row], None], command: str) -> None:
    found = measured(spec_of(name).expand(SITE))
    row = _row(name, f"time of {name} at 8x32x32, forward", found, "float32", PLAIN, command)
    record(row)
    assert 0 < float(row.numbers["share"]) < 1


ON_FLEX = (
    "block_sparse",
    "nabla",
    "radial",
    "sla2",
    "sparge2",
    "sparse_linear",
    "sparse_videogen",
    "subblock",
    "video_sparse",
)
"""Designs that flex runs on a CPU: lists of blocks, and no log-sum-exp for a far field."""


@pytest.mark.parametrize("name", ON_FLEX)
def test_time_compiled(name: str, record: Callable[[Row], None], command: str) -> None:
    found = measured(with_kernel(spec_of(name).expand(SITE), "flex"))
    row = _row(name, f"time of {name} at 8x32x32, forward, compiled", found, "float32", COMPILED, command)
    record(row)
    assert "flex" in row.kernel


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GPU_HEADS)
@pytest.mark.parametrize("tokens", GPU_GRIDS)
@pytest.mark.parametrize("name", sparse_names())
def test_time_on_a_gpu(name: str, tokens: str, heads: int, record: Callable[[Row], None], command: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    grid = GPU_GRIDS[tokens]
    rope = Rope(axes=(44, 42, 42))
    site = Site(dim=heads * GPU_HEAD_DIM, heads=heads, head_dim=GPU_HEAD_DIM, layer=5, layers=30, grid=grid, rope=rope)
    spec = spec_of(name).expand(site)
    found = measured(spec, site, "cuda", torch.bfloat16)
    bound = CHOSEN_ON_GPU if spec.traits().selects else FIXED_ON_GPU
    case = f"time of {name} at {grid.t}x{grid.h}x{grid.w}, {heads} heads of {GPU_HEAD_DIM}, forward"
    row = _row(name, case, found, "bfloat16", bound, command)
    record(row)
    assert 0 < float(row.numbers["share"]) < 1
