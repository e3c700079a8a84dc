"""The 1.3B UltraGen model of `recipes/ultragen_4k.yaml` exported whole, proof included: time, anonymous memory, file sizes.

python benchmarks/export_full_size.py                       # ONNX in fp32 and fp16, .pt2 in fp32 and bf16
python benchmarks/export_full_size.py --only onnx-float32
python benchmarks/export_full_size.py --layers 4            # a shorter one, which is written down as such

Each export is the command `ultrazoo export`, in a process of its own that is watched. The proof runs the file in another one, at
small grids. Tens of minutes on two cores, and up to 12 GB of disk in `--place`, which are freed again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import Watched, watch
from benchmarks.rows import ROOT, Row, store

RECIPE = "recipes/ultragen_4k.yaml"
LAYERS = 30
EXPORTS = ("onnx-float32", "onnx-float16", "pt2-float32", "pt2-bfloat16")
LIMIT = 24 * 2**30
GIGABYTE = 10**9


def run(which: str, layers: int, place: Path) -> Row:
    """One export in `place`. Raises RuntimeError when it fails; a proof that does not hold is such a failure."""
    target, _, dtype = which.partition("-")
    out = place / which
    short = [] if layers == LAYERS else [f"backbone.layers={layers}"]
    program = [sys.executable, "-m", "ultrazoo", "export", RECIPE, *short]
    command = [*program, "--to", target, "--dtype", dtype, "-o", str(out)]
    done = watch(command, cwd=ROOT, env=dict(os.environ), timeout_s=7200)
    if done.code:
        raise RuntimeError(f"{' '.join(command)} ended with {done.code}:\n{done.output}")
    found = json.loads((out / "export.json").read_text(encoding="utf-8"))
    title = "UltraGen on Wan2.1-T2V-1.3B" + ("" if layers == LAYERS else f", {layers} of its {LAYERS} layers")
    proof = found["proof"]
    worst = max(case["ratio"] for case in proof["cases"])
    grids = ", ".join("x".join(str(case["sizes"][axis]) for axis in "thw") for case in proof["cases"])
    short_command = f" --layers {layers}" if short else ""
    return Row(
        case=f"{title} to {target}, batch, T, H, W and text open",
        attention="ultragen",
        dtype=dtype,
        gate=f"error ratio at most {worst:.1e} (allowed {proof['allowed']:g}) in {proof['runtime']['runtime']} at grids {grids}",
        numbers=_numbers(done, found),
        command=f"python benchmarks/export_full_size.py --only {which}{short_command}",
        target="peak memory of all processes under 24 GiB",
        met=done.peak_anon < LIMIT,
        kernel=", ".join(proof["runtime"]["kernels"]),
        recipe_hash=found["hash"],
    )


def _numbers(done: Watched, found: dict[str, Any]) -> dict[str, float | int | str]:
    numbers: dict[str, float | int | str] = {
        "wall_s": round(done.wall_s),
        **{name: round(seconds, 1) for name, seconds in found["spent"].items()},
        "load_s": found["proof"]["load_s"],
        "peak_anon_gb": round(done.peak_anon / GIGABYTE, 2),
        "export_peak_anon_gb": round(done.peak_of("ultrazoo export") / GIGABYTE, 2),
        "proof_peak_anon_gb": round(done.peak_of("ultrazoo.export.fresh") / GIGABYTE, 2),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }
    for name, one in found["files"].items():
        if name != "proof.safetensors":
            numbers[f"{name}_gb"] = round(one["bytes"] / GIGABYTE, 3)
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=EXPORTS, help="one of them")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try it")
    parser.add_argument(
        "--place", type=Path, help="a directory with room; the system's for temporary files unless given"
    )
    parser.add_argument("--no-results", action="store_true", help="measure and check, write nothing")
    arguments = parser.parse_args()
    rows = []
    for which in [arguments.only] if arguments.only else EXPORTS:
        with tempfile.TemporaryDirectory(prefix="ultrazoo-export-", dir=arguments.place) as work:
            rows.append(run(which, arguments.layers, Path(work)))
        if not arguments.no_results:
            store(rows[-1:], name="export")
        print(json.dumps({"case": rows[-1].case, "dtype": rows[-1].dtype, **rows[-1].numbers}, indent=1), flush=True)
    return 0 if all(row.met for row in rows) else 3


if __name__ == "__main__":
    raise SystemExit(main())
