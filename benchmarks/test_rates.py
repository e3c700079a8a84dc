"""How fast attention runs, against what the same processor does in the same run.

The released UltraGen block at C 1536, 12 heads, grid (5, 32, 64), fp32, on two threads, against a plain large fp32 matmul: all
rates are FLOPs per second, the block's FLOPs from its own cost (matmul, convolution and attention; resizing, norms and rotary
embedding count nothing). The matmul has the shape of one of the block's projections, (10240, 1536) by (1536, 1536); a square one
of 3072 into memory that stands ready, the most this processor gives, is stated beside it. And windows against full attention on
the same tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ultrazoo
from benchmarks.conftest import THREADS
from benchmarks.gates import against_oracle, against_reference_kernel
from benchmarks.measure import Timing, interleaved
from benchmarks.rows import Row
from ultrazoo.grid import Grid
from ultrazoo.spec import Rope, Site

DIM, HEADS, GRID = 1536, 12, (5, 32, 64)
LAYERS = 30
ROPE = Rope(axes=(44, 42, 42))
SQUARE = 3072
ROUNDS = 9


def _matmul() -> Callable[[], object]:
    """A plain matmul of a projection's shape."""
    a, b = torch.randn(math.prod(GRID), DIM), torch.randn(DIM, DIM)
    return lambda: torch.mm(a, b)


def _square() -> Callable[[], object]:
    """A square matmul without the cost of fresh memory."""
    a, b = (torch.randn(SQUARE, SQUARE) for _ in range(2))
    out = torch.empty(SQUARE, SQUARE)
    return lambda: torch.mm(a, b, out=out)


def _block(name: str, layer: int, **options: Any) -> tuple[Any, Site]:
    torch.manual_seed(0)
    block = ultrazoo.create_attention(
        name, dim=DIM, heads=HEADS, layer=layer, layers=LAYERS, rope=ROPE, qk_norm=True, **options
    ).eval()
    site = block.site.at(grid=Grid(*GRID))
    return block, site


def _timed(benchmark: Any, calls: dict[str, Callable[[], object]], main: str) -> dict[str, Timing]:
    """Time `main` by pytest-benchmark, and the other calls in turn with it, before each of its rounds."""
    others = {name: call for name, call in calls.items() if name != main}
    samples: dict[str, list[float]] = {name: [] for name in others}

    def setup() -> None:
        for name, timing in interleaved(others, rounds=1, warmup=0).items():
            samples[name] += timing.samples_s

    benchmark.pedantic(calls[main], setup=setup, rounds=ROUNDS, warmup_rounds=1)
    found = {name: Timing(tuple(values[-ROUNDS:])) for name, values in samples.items()}
    return found | {main: Timing(tuple(benchmark.stats.stats.data))}


@pytest.mark.benchmark(group="block")
@pytest.mark.parametrize("layer", [4, 5], ids=["even", "odd"])
def test_released_block_against_matmul(layer: int, benchmark: Any, record: Callable[[Row], None], command: str) -> None:
    small = against_oracle("ultragen", layer=layer, layers=LAYERS, rank=8, variant="released")
    block, site = _block("ultragen", layer, variant="released")
    x = torch.randn(1, site.tokens, DIM)
    timestep = torch.tensor([500.0])
    with torch.inference_mode():
        whole = against_reference_kernel(block, x, GRID, timestep)
        calls = {"matmul": _matmul(), "square": _square(), "block": lambda: block(x, GRID, timestep)}
        times = _timed(benchmark, calls, "block")
    rate = block.attention.spec.cost(site).flops / times["block"].median_s
    peak = 2 * site.tokens * DIM * DIM / times["matmul"].median_s
    square = 2 * SQUARE**3 / times["square"].median_s
    # pair by pair: the speed of a shared machine drifts from round to round, for both alike
    pairs = zip(times["matmul"].samples_s, times["block"].samples_s, strict=True)
    work = block.attention.spec.cost(site).flops / (2 * site.tokens * DIM * DIM)
    share = statistics.median(work * matmul_s / block_s for matmul_s, block_s in pairs)
    numbers = {
        "block_s": round(times["block"].median_s, 3),
        "block_gflops": round(rate / 1e9, 1),
        "matmul_gflops": round(peak / 1e9, 1),
        "share_of_matmul": round(share, 3),
        "square_gflops": round(square / 1e9, 1),
        "share_of_square": round(rate / square, 3),
        "spread": round(times["block"].spread, 2),
    }
    # no rate of a block that computes something else
    assert max(small, whole) < 1e-5
    gate = f"oracle fp64 {small:.1e} (small grid); plain softmax {whole:.1e} (this grid)"
    # the odd layer resizes to 35 x 65: windows of sizes that nothing divides, which the figure asked for does not name
    target = "at least 0.75 of the matmul rate" if layer % 2 == 0 else ""
    met = share >= 0.75 if target else None
    case = f"released block, layer {layer}, C {DIM}, {HEADS} heads, grid {GRID}, {THREADS} threads"
    record(Row(case, "ultragen released", "float32", gate, numbers, command, target, met, kernel="sdpa"))
    assert met is not False, numbers


@pytest.mark.benchmark(group="windows")
def test_windows_against_full(benchmark: Any, record: Callable[[Row], None], command: str) -> None:
    windows = {"branches": {"local": {"layout": {"name": "windows", "counts": [4, 4]}}}}
    one = {"branches": {"local": {"layout": {"name": "windows", "counts": [1, 1]}}}}
    small = against_oracle("branched", **windows)
    full, site = _block("full", 0)
    local, _ = _block("branched", 0, **windows)
    whole, _ = _block("branched", 0, **one)
    for block in (local, whole):
        block.load_state_dict(full.state_dict())
    x = torch.randn(1, site.tokens, DIM)
    with torch.inference_mode():
        same = float((whole(x, GRID) - full(x, GRID)).square().mean().sqrt() / full(x, GRID).square().mean().sqrt())
        assert same < 5e-6
        times = _timed(benchmark, {"full": lambda: full(x, GRID), "windows": lambda: local(x, GRID)}, "windows")
    costs = {"full": full.attention.spec.cost(site).flops, "windows": local.attention.spec.cost(site).flops}
    faster = times["full"].median_s / times["windows"].median_s
    fewer = costs["full"] / costs["windows"]
    numbers = {
        "full_s": round(times["full"].median_s, 3),
        "windows_s": round(times["windows"].median_s, 3),
        "faster": round(faster, 2),
        "fewer_flops": round(fewer, 2),
    }
    gate = f"oracle fp64 {small:.1e}; one window equals full {same:.1e}"
    case = f"4x4 windows against full, C {DIM}, {HEADS} heads, grid {GRID}, {THREADS} threads"
    record(
        Row(
            case,
            "branched",
            "float32",
            gate,
            numbers,
            command,
            "at least 0.7 of the FLOPs ratio",
            faster >= 0.7 * fewer,
            kernel="sdpa",
        )
    )
    assert faster >= 0.7 * fewer, numbers


@pytest.mark.gpu
@pytest.mark.benchmark(group="gpu")
@pytest.mark.parametrize("name", ["full", "ultragen"])
def test_block_on_a_gpu(name: str, benchmark: Any, record: Callable[[Row], None], command: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    options = {"variant": "paper"} if name == "ultragen" else {}
    small = against_oracle(name, layer=4, layers=LAYERS, **({"rank": 8} | options if options else {}))
    block, site = _block(name, 4, **options)
    block = block.to("cuda", torch.bfloat16)
    x = torch.randn(1, site.tokens, DIM, device="cuda", dtype=torch.bfloat16)
    timestep = torch.tensor([500.0], device="cuda")

    def call() -> None:
        block(x, GRID, timestep)
        torch.cuda.synchronize()

    with torch.inference_mode():
        whole = against_reference_kernel(block, x, GRID, timestep)
        torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(call, rounds=20, warmup_rounds=5)
    timing = Timing(tuple(benchmark.stats.stats.data))
    numbers = {
        "block_ms": round(1e3 * timing.median_s, 3),
        "tflops": round(block.attention.spec.cost(site).flops / timing.median_s / 1e12, 1),
        "spread": round(timing.spread, 2),
        "peak_mib": torch.cuda.max_memory_allocated() >> 20,
    }
    gate = f"oracle fp64 {small:.1e} (CPU, small grid); plain softmax {whole:.1e}"
    record(
        Row(
            f"{name} block, C {DIM}, {HEADS} heads, grid {GRID}",
            name,
            "bfloat16",
            gate,
            numbers,
            command,
            device=torch.cuda.get_device_name(),
        )
    )
    assert numbers["tflops"] > 0
