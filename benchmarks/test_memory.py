"""Memory that must stay small: rotary tables at 4K, and a forward of the 1.3B model on a CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from benchmarks.gates import against_oracle
from benchmarks.live import Live
from benchmarks.measure import watch
from benchmarks.rows import ROOT, Row
from ultrazoo.attention.contract import grid_positions
from ultrazoo.ops import rope as ops_rope
from ultrazoo.spec import Rope

GRID_4K = (21, 136, 240)
FORWARD_GRID = (2, 24, 40)
MEGABYTE, GIGABYTE = 10**6, 10**9


def test_rope_tables_at_4k(record: Callable[[Row], None], command: str) -> None:
    rope = Rope(axes=(44, 42, 42))
    positions = grid_positions(GRID_4K)
    tables = [axis.angles for axis in ops_rope.tables(positions, rope)]
    # right where they can be told by hand: token (t, y, x) turns the first pair of each axis by t, y and x
    for table, size in zip(tables, GRID_4K, strict=True):
        assert torch.equal(table[:, 0], torch.arange(size, dtype=table.dtype))
    kept = sum(table.numel() * table.element_size() for table in tables)

    z = torch.randn(1, GRID_4K[0] * GRID_4K[1] * GRID_4K[2], 1, 128)
    with Live(z, *positions[:3]) as live, torch.inference_mode():
        rotated = ops_rope.rotate(z, positions, rope)
    # a rotation keeps every length
    torch.testing.assert_close(rotated.square().sum(-1), z.square().sum(-1), rtol=1e-4, atol=1e-4)
    working = live.peak - rotated.numel() * rotated.element_size()
    numbers = {"tables_bytes": kept, "peak_beside_output_bytes": working}
    met = max(kept, working) < 10 * MEGABYTE
    case = f"rope at 4K, grid {GRID_4K}, one head of 128"
    gate = "first pair of each axis turns by its position; lengths kept"
    record(Row(case, "", "float32", gate, numbers, command, "under 10 MB", met))
    assert met, numbers


def test_forward_of_1_3b_on_a_cpu(environment: dict[str, str], record: Callable[[Row], None], command: str) -> None:
    small = against_oracle("ultragen", layer=4, layers=30, rank=8, variant="paper")
    line = [sys.executable, "benchmarks/forward.py", "recipes/ultragen_1080p.yaml", *map(str, FORWARD_GRID)]
    done = watch(line, cwd=ROOT, env=environment)
    assert done.code == 0, done.output
    told = json.loads(done.output.strip().splitlines()[-1])
    assert told["finite"]
    assert told["parameters"] == told["planned"]
    numbers = {
        "peak_anon_gb": round(done.peak_anon / GIGABYTE, 2),
        "forward_s": round(told["forward_s"], 1),
        "wall_s": round(done.wall_s, 1),
        "parameters": told["parameters"],
    }
    gate = f"oracle fp64 {small:.1e}; output finite and of the shape of its input; parameters as the plan says"
    met = done.peak_anon < 8 * GIGABYTE
    record(
        Row(
            f"ultragen_1080p 1.3B forward, grid {FORWARD_GRID}",
            "ultragen",
            "bfloat16",
            gate,
            numbers,
            command,
            "under 8 GB",
            met,
            recipe_hash=told["hash"],
        )
    )
    assert met
