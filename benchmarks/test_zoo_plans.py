"""What a plan at 4K costs by itself: seconds and memory of `ultrazoo plan` for every attention at grid (21, 136, 240).

Each plan runs in its own process, as a person would run it, in turn with a bare ``import torch``; nothing is kept between them. The
memory is anonymous memory of the process (RssAnon).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gates import examples_as_priced
from benchmarks.measure import Watched, watch
from benchmarks.rows import ROOT, Row
from ultrazoo import api, catalog, registry

RESULTS_NAME = "zoo"
GRID = [21, 136, 240]
ROUNDS = 2
NAMES = sorted(row.name for row in registry.entries("attention") if row.builtin)
TORCH = [sys.executable, "-c", "import torch"]
MEGABYTE = 10**6


def _best(line: list[str], environment: dict[str, str]) -> Watched:
    """The fastest of some runs."""
    runs = [watch(line, cwd=ROOT, env=environment, timeout_s=120) for _ in range(ROUNDS)]
    assert all(run.code == 0 for run in runs), runs[0].output
    return min(runs, key=lambda run: run.wall_s)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_at_4k_is_quick_and_small(
    name: str, environment: dict[str, str], record: Callable[[Row], None], command: str, tmp_path: Path
) -> None:
    examples = examples_as_priced(name)
    recipe = catalog.describe(name, "attention").recipe
    assert recipe is not None
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(recipe | {"video": {"grid": GRID}}), encoding="utf-8")
    torch = _best(TORCH, environment)
    done = _best([sys.executable, "-m", "ultrazoo", "plan", str(file)], environment)
    plan = api.plan(file)
    peak = max(layer.peak_bytes for layer in plan.layers)
    assert list(plan.grid) == GRID
    assert str(plan.grid) in done.output
    assert peak > 0
    assert "peak: most bytes alive at once inside the attention" in done.output
    numbers: dict[str, float | int | str] = {
        "wall_s": round(done.wall_s, 2),
        "import_torch_s": round(torch.wall_s, 2),
        "over_import_s": round(done.wall_s - torch.wall_s, 2),
        "peak_anon_mb": round(done.peak_anon / MEGABYTE),
        "import_torch_anon_mb": round(torch.peak_anon / MEGABYTE),
        "planned_peak_gb": round(peak / 10**9, 2),
    }
    met = done.wall_s - torch.wall_s < 3 and done.peak_anon - torch.peak_anon < 200 * MEGABYTE
    gate = f"pairs of {examples} examples as they reach the kernel door; grid of the plan"
    case = f"ultrazoo plan, 30 layers of {name}, grid (21, 136, 240)"
    record(
        Row(
            case,
            name,
            "",
            gate,
            numbers,
            command,
            "under 3 s and 200 MB beside the import of torch",
            met,
            recipe_hash=plan.hash,
        )
    )
    assert met, numbers
