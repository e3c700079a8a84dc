"""``python -m ultrazoo.export.fresh FILE FOLDER``: load an exported file where nothing of its making is left, run it on the
kept inputs, print error ratios and facts as one line of JSON; one file, or one after the other in one process."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from . import record
from .proof import cases_in, ratio, stand_ins
from .targets import target


def prove(file: Path, folder: Path) -> dict[str, Any]:
    """Error ratios of `file` at the cases kept in `folder`, weights that had stand-ins and are not zero in the file, seconds
    per forward, and what the runtime says of itself."""
    import torch

    facts = record.read(folder)
    start = time.perf_counter()
    loaded = target(facts["target"]).Loaded(file)
    zeros = facts["proof"]["stand_ins"]
    wrong = loaded.not_zero(zeros)
    if zeros:
        values = stand_ins(zeros, getattr(torch, facts["dtype"]))
        loaded.replace({name: value.to(facts["device"]) for name, value in values.items()})
    ratios, seconds = [], []
    names = [port["name"] for port in facts["inputs"]]
    for inputs, due in cases_in(folder):
        placed = {name: inputs[name].to(facts["device"]) for name in names}
        before = time.perf_counter()
        got = loaded.run(placed).cpu()
        seconds.append(round(time.perf_counter() - before, 4))
        ratios.append(ratio(got, due))
    return {
        "ratios": ratios,
        "not_zero": wrong,
        "seconds": seconds,
        "load_s": round(time.perf_counter() - start - sum(seconds), 2),
        "facts": loaded.facts(),
    }


def answer(file: str, folder: str) -> str:
    """One line of JSON: what `prove` finds, or the error that kept it from it."""
    try:
        found = prove(Path(file), Path(folder))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        found = {"error": f"{type(error).__name__}: {lines[0]}"}
    return json.dumps(found)


def main(arguments: list[str]) -> int:
    """``FILE FOLDER`` proves one file; without arguments, one for each line of stdin that holds both as a JSON list."""
    if arguments:
        print(answer(*arguments))
        return 0
    for line in sys.stdin:
        print(answer(*json.loads(line)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
