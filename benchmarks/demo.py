"""`make demo` on a fresh clone: wall time, anonymous memory, and that the file holds every parameter of the plan.

python benchmarks/demo.py            # packages from the installer's cache where it has them
python benchmarks/demo.py --cold     # with an empty cache: everything is downloaded
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import watch
from benchmarks.rows import ROOT, Row, store

DIRECTORY = "outputs/ultragen_4k"
LIMIT_S = 300
GIGABYTE = 10**9


def stored(directory: Path) -> tuple[int, int]:
    """Parameters and bytes in the safetensors files of a directory, from their headers alone."""
    count = size = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for tensor in header.values():
            numel = 1
            for extent in tensor["shape"]:
                numel *= extent
            count += numel
            size += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return count, size


def clone(into: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(into)], check=True)
    return into


def run(cold: bool) -> Row:
    """Clone, `make demo` twice, compare the file with the plan. Raises RuntimeError when a step fails."""
    with tempfile.TemporaryDirectory(prefix="ultrazoo-demo-") as work:
        checkout = clone(Path(work) / "ultrazoo")
        env = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
        if cold:
            env["UV_CACHE_DIR"] = str(Path(work) / "cache")
        first = watch(["make", "demo"], cwd=checkout, env=env)
        second = watch(["make", "demo"], cwd=checkout, env=env)
        if first.code or second.code:
            raise RuntimeError(f"make demo failed:\n{first.output}\n{second.output}")
        plan = json.loads((checkout / DIRECTORY / "plan.json").read_text(encoding="utf-8"))
        count, size = stored(checkout / DIRECTORY)
    if count != plan["totals"]["parameters"]:
        raise RuntimeError(f"the file holds {count} parameters, the plan says {plan['totals']['parameters']}")
    build = first.peak_of("ultrazoo build")
    allowed = 1.3 * size + 1.5 * GIGABYTE
    numbers = {
        "wall_s": round(first.wall_s, 1),
        "second_wall_s": round(second.wall_s, 2),
        "build_peak_anon_gb": round(build / GIGABYTE, 2),
        "allowed_anon_gb": round(allowed / GIGABYTE, 2),
        "peak_anon_with_installer_gb": round(first.peak_anon / GIGABYTE, 2),
        "parameters": count,
        "weights_gb": round(size / GIGABYTE, 2),
    }
    return Row(
        case=f"make demo on a fresh clone, {'empty' if cold else 'warm'} package cache",
        attention="ultragen",
        dtype="bfloat16",
        gate="the file holds every parameter of the plan, to the number",
        numbers=numbers,
        command=f"python benchmarks/demo.py{' --cold' if cold else ''}",
        target="under 300 s; anonymous memory at most 1.3 x the weights + 1.5 GB",
        met=first.wall_s < LIMIT_S and build <= allowed and first.peak_anon <= allowed,
        recipe_hash=plan["hash"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", action="store_true", help="with an empty package cache")
    parser.add_argument("--no-results", action="store_true", help="measure and check, write nothing")
    arguments = parser.parse_args()
    row = run(arguments.cold)
    if not arguments.no_results:
        store([row], name="demo")
    print(json.dumps({"case": row.case, **row.numbers, "met": row.met}, indent=1))
    return 0 if row.met else 3


if __name__ == "__main__":
    raise SystemExit(main())
