"""Peak memory of every attention beside its input, at 4, 8, 16 and 32 thousand tokens of 256 channels: no faster than N x C.

Tensors are counted storage by storage and everything that Python and numpy hold (maps of blocks, orders) by tracemalloc;
the sum of both peaks is reported in units of N x C elements, so that growth in proportion to tokens is a constant.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gates import examples_against_oracle
from benchmarks.live import Live
from benchmarks.rows import Row
from ultrazoo import kernels, registry
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site

RESULTS_NAME = "zoo"
GRIDS = ((4, 32, 32), (8, 32, 32), (16, 32, 32), (16, 32, 64))
SITE = Site(dim=256, heads=4, head_dim=64, layer=5, layers=30, rope=Rope(axes=(24, 20, 20)), qk_norm=True)
ELEMENT = 4
SLACK = 1.15
"""Most that the peak per token and channel may rise from the smallest size to any other."""

OPTIONS: dict[str, dict[str, Any]] = {
    # four heads here
    "by_head": {"groups": {"0-1": {"name": "full"}, "2-3": {"name": "axes"}}},
    # tiles of six frames do not fit into four
    "sliding_tile": {"tile": [4, 8, 8], "window": [3, 3, 3]},
    # the default windows hold the whole of a short clip, and nothing is left to the linear branch
    "delta": {"chunk": 1, "radius": 1},
}
NAMES = sorted(row.name for row in registry.entries("attention") if row.builtin)


def spec_of(name: str) -> AttentionSpec:
    """The attention with the options above, or with those of its smallest recipe."""
    options = OPTIONS.get(name, registry.find("attention", name).minimal)
    spec, problems = parse_part("attention", {"name": name, **options})
    assert isinstance(spec, AttentionSpec), problems
    return spec


def peaks(spec: AttentionSpec, grid: tuple[int, int, int]) -> tuple[float, float, float, str]:
    """Peak beside the input (tensors, Python) and as planned, in N x C elements of fp32; and the kernels that ran."""
    site = SITE.at(grid=Grid(*grid))
    block = Standalone(spec, site)
    reset_parameters(block)
    x = torch.randn(1, site.tokens, site.dim, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([500.0])
    gc.collect()
    tracemalloc.start()
    try:
        with kernels.record() as runs, torch.inference_mode(), Live(x, timestep, *block.parameters()) as live:
            y = block(x, grid, timestep)
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert y.shape == x.shape
    assert bool(torch.isfinite(y).all())
    unit = site.tokens * site.dim
    planned = spec.expand(site).cost(site).peak_elements / unit
    return (
        live.peak / unit / ELEMENT,
        python / unit / ELEMENT,
        planned,
        " + ".join(sorted({run.kernel for run in runs})),
    )


@pytest.mark.parametrize("name", NAMES)
def test_peak_grows_no_faster_than_tokens(name: str, record: Callable[[Row], None], command: str) -> None:
    error = examples_against_oracle(name)
    spec = spec_of(name)
    # what is imported and compiled once is not the mechanism's
    peaks(spec, GRIDS[0])
    numbers: dict[str, float | int | str] = {}
    found = []
    for grid in GRIDS:
        tensors, python, planned, ran = peaks(spec, grid)
        tokens = grid[0] * grid[1] * grid[2]
        numbers[f"peak_nc_{tokens // 1024}k"] = round(tensors + python, 2)
        found.append(tensors + python)
    numbers["planned_nc_32k"] = round(planned, 2)
    numbers["peak_mb_32k"] = round(found[-1] * tokens * SITE.dim * ELEMENT / 10**6, 1)
    met = max(found) <= SLACK * found[0]
    gate = f"oracle fp64, its examples: {error:.1e}"
    target = f"per N x C at most {SLACK} of the first"
    case = f"peak memory of {name}, C 256, forward"
    record(Row(case, name, "float32", gate, numbers, command, target, met, kernel=ran))
    assert met, numbers
