"""Measure the exact kernels on this machine and keep their order in the user's cache."""

from __future__ import annotations

import datetime as dt
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import registry, tuned
from ..errors import KernelError
from ..ops.blocks import Blocks, even_blocks
from .block_map import BlockMap
from .door import ELSEWHERE, PREFERENCE, Inputs, measured_key

REPEATS = 7
BLOCK, SHARE = 128, 0.15
SIZES = {"cpu": (2048, 4), "cuda": (16384, 12)}
"""Tokens and heads of a measured call, per kind of device."""


@dataclass(frozen=True)
class Measured:
    """One kernel on one kind of call: median seconds, and its error against the first exact kernel."""

    key: str
    kernel: str
    seconds: float
    error: float


def tune(report: Callable[[str], object] = str) -> tuple[list[Measured], Path]:
    """Time every exact kernel that can run; write the orders. Returns the rows and the file.

    Raises KernelError when a kernel gives a wrong answer, OSError when the cache cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Measured] = []
    for inputs in _calls(device):
        rows += _compare(inputs, report)
    orders: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.seconds):
        orders.setdefault(row.key, []).append(row.kernel)
    return rows, tuned.save(dt.date.today().isoformat(), orders)


def _calls(device: torch.device) -> Iterator[Inputs]:
    tokens, heads = SIZES[device.type]
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    generator = torch.Generator().manual_seed(0)
    blocks, single = even_blocks(tokens, BLOCK), even_blocks(tokens, 1)
    maps = [_map(queries, blocks, heads, device, generator) for queries in (blocks, single)]
    for dtype in dtypes:
        for size in (64, 128):
            q, k, v = (torch.randn(1, heads, tokens, size, generator=generator).to(device, dtype) for _ in range(3))
            yield Inputs(q, k, v)
            yield from (Inputs(q, k, v, block_map=one) for one in maps)


def _map(queries: Blocks, keys: Blocks, heads: int, device: torch.device, generator: torch.Generator) -> BlockMap:
    """A share of the key blocks for every query block, its own among them."""
    chosen = torch.rand(1, heads, queries.count, keys.count, generator=generator) < SHARE
    own = torch.tensor(queries.starts[:-1]) // BLOCK
    chosen |= own[:, None] == torch.arange(keys.count)
    chosen = chosen.to(device)
    return BlockMap(queries, keys, lambda lo, hi: chosen[:, :, lo:hi], 1, heads, device)


def _compare(inputs: Inputs, report: Callable[[str], None]) -> list[Measured]:
    names = list(dict.fromkeys((*PREFERENCE.get(inputs.q.device.type, ELSEWHERE), "flex", "flex_flash", "xformers")))
    able = [name for name in names if not registry.find("kernel", name).reasons(inputs)]
    reference: Tensor | None = None
    samples: dict[str, list[float]] = {name: [] for name in able}
    errors: dict[str, float] = {}
    key = measured_key(inputs)
    with torch.no_grad():
        for name in able:
            out = registry.find("kernel", name).run(inputs)[0].double()
            reference = out if reference is None else reference
            errors[name] = float((out - reference).norm() / reference.norm())
            if errors[name] > 0.02:
                raise KernelError(f"kernel {name!r} differs from {able[0]!r} by {errors[name]:.1e} on {key}")
        # in turn, so that a machine that slows down slows all of them
        for _ in range(REPEATS):
            for name in able:
                samples[name].append(_seconds(name, inputs))
    rows = [Measured(key, name, statistics.median(samples[name]), errors[name]) for name in able]
    for row in sorted(rows, key=lambda row: row.seconds):
        report(f"{row.key}: {row.kernel} {1e3 * row.seconds:.2f} ms")
    return rows


def _seconds(name: str, inputs: Inputs) -> float:
    run = registry.find("kernel", name).run
    if inputs.q.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(inputs)
    if inputs.q.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
