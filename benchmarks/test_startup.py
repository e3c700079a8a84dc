"""How long a person waits: `--help`, `list`, `plan` and `build --device meta`, against importing torch.

Each command runs in its own process, in turn with a bare ``import torch``, and the fastest run counts after one that warms the
file cache: the figures are about our code, not about the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest

from benchmarks.rows import ROOT, Row

PROGRAM = [sys.executable, "-m", "ultrazoo"]
RECIPE = "recipes/ultragen_4k.yaml"


def _best(command: Sequence[str], environment: dict[str, str], rounds: int) -> tuple[float, str]:
    """Fastest wall seconds of `rounds` runs after a warm-up, and what the last one printed."""
    samples, output = [], ""
    for _ in range(rounds + 1):
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        samples.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    return min(samples[1:]), output


def _imports(arguments: Sequence[str], environment: dict[str, str]) -> set[str]:
    """Top-level modules that a command imports."""
    code = (
        "import sys, ultrazoo.cli; code = ultrazoo.cli.main(sys.argv[1:]); "
        "print('\\nMODULES', *sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=["help", "list"])
def test_light_commands(
    arguments: list[str], environment: dict[str, str], record: Callable[[Row], None], command: str
) -> None:
    imported = _imports(arguments, environment)
    assert not imported & {"torch", "omegaconf", "numpy"}
    wall, output = _best([*PROGRAM, *arguments], environment, rounds=5)
    assert output.strip()
    case = f"ultrazoo {' '.join(arguments)}"
    target = "under 0.5 s, no torch"
    record(
        Row(
            case, "", "", "imports neither torch nor omegaconf", {"wall_s": round(wall, 3)}, command, target, wall < 0.5
        )
    )
    assert wall < 0.5


def test_plan_against_import_torch(environment: dict[str, str], record: Callable[[Row], None], command: str) -> None:
    walls, outputs = {}, {}
    for name, line in {
        "torch": [sys.executable, "-c", "import torch"],
        "plan": [*PROGRAM, "plan", RECIPE, "--json"],
    }.items():
        walls[name], outputs[name] = _best(line, environment, rounds=3)
    plan = json.loads(outputs["plan"])
    assert plan["grid"] == [21, 136, 240]
    over = walls["plan"] - walls["torch"]
    numbers = {
        "wall_s": round(walls["plan"], 2),
        "import_torch_s": round(walls["torch"], 2),
        "over_import_s": round(over, 2),
    }
    gate = "grid of the plan is (21, 136, 240)"
    target = "import of torch plus 1.5 s"
    record(
        Row(
            "ultrazoo plan ultragen_4k",
            "ultragen",
            "",
            gate,
            numbers,
            command,
            target,
            over < 1.5,
            recipe_hash=plan["hash"],
        )
    )
    assert over < 1.5


def test_build_on_meta(environment: dict[str, str], record: Callable[[Row], None], command: str) -> None:
    wall, output = _best([*PROGRAM, "build", RECIPE, "--device", "meta", "--json"], environment, rounds=1)
    built = json.loads(output)
    plan = json.loads(_best([*PROGRAM, "plan", RECIPE, "--json"], environment, rounds=1)[1])
    assert built["parameters"] == plan["totals"]["parameters"]
    gate = f"{built['parameters']} parameters, as the plan says"
    target = "under 15 s"
    record(
        Row(
            "ultrazoo build --device meta ultragen_4k",
            "ultragen",
            "",
            gate,
            {"wall_s": round(wall, 2)},
            command,
            target,
            wall < 15,
            recipe_hash=plan["hash"],
        )
    )
    assert wall < 15
