"""The page of export proofs, made at build time from the table that `make proof` writes.

A claim of the registry without its proof stops the build, with its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = "export-proofs.md"
TABLE = Path(__file__).parents[2] / "tests" / "export" / "proofs.json"

INTRODUCTION = """\
Every attention that claims an export target, exported in small models of both native backbones with random weights, loaded in
a fresh process and compared with the model: made from the table that `make proof` writes. Numbers are error ratios (RMS of the
difference over RMS of the model's answer; at most 1e-5 is allowed in float32) at a size that was not traced and that
nothing divides: frames, rows and columns are three different primes. Batches of 1 and 2, a size that windows divide and the
traced size are compared as well. What `wan` is for videos, `dit` is for images where the attention takes them.

`make test` proves a tenth of the quick pairs again, another tenth every day. An attention that is not here exports to nothing;
`ultrazoo describe` says why. Models of one layer go to `aoti`, of two to the others.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the documentation."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page(json.loads(TABLE.read_text()))))
    return files


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown: attentions by targets, then every case. Raises RuntimeError where a built-in's claim has no row."""
    from ultrazoo.ports import EXPORTS

    _require_claims(rows)
    lines = ["# Export proofs", "", INTRODUCTION, _versions(rows), ""]
    lines += ["## Attentions", "", "Cases proved and the largest ratio among them.", ""]
    lines += [_header(["attention"], EXPORTS)]
    for attention in _unique(row["case"].partition("/")[0] for row in rows):
        cells = []
        for target in EXPORTS:
            found = [r["ratio"] for r in rows if r["target"] == target and r["case"].partition("/")[0] == attention]
            cells.append(f"{len(found)}: {max(found):.0e}" if found else "–")
        lines.append(f"| [{attention}](gallery.md#{attention}) | {' | '.join(cells)} |")
    lines += ["", "## Cases", "", "Forms by number are the examples of the contract suite.", ""]
    lines += [_header(["attention", "form", "backbone", "T×H×W"], EXPORTS)]
    for case in _unique(row["case"] for row in rows):
        found = {row["target"]: row for row in rows if row["case"] == case}
        sizes = "×".join(map(str, next(iter(found.values()))["ragged"]))
        cells = [f"{found[target]['ratio']:.0e}" if target in found else "–" for target in EXPORTS]
        lines.append(f"| {' | '.join([*case.split('/'), sizes, *cells])} |")
    lines += ["", "## Kernels", "", "Attention operators that ran in the proofs, and in how many.", ""]
    lines += ["| target | |", "| --- | --- |"]
    for target in EXPORTS:
        kernels = [", ".join(row["kernels"]) or "none" for row in rows if row["target"] == target]
        counts = sorted(((kernels.count(one), one) for one in set(kernels)), reverse=True)
        lines.append(f"| {target} | {'; '.join(f'{one} ({count})' for count, one in counts)} |")
    return "\n".join(lines) + "\n"


def _header(names: list[str], targets: Iterable[str]) -> str:
    columns = [*names, *targets]
    rule = ["---" if column in names else "---:" for column in columns]
    return f"| {' | '.join(columns)} |\n| {' | '.join(rule)} |"


def _versions(rows: list[dict[str, Any]]) -> str:
    found = {name: sorted({row[name] for row in rows if name in row}) for name in ("torch", "onnxruntime")}
    return "Versions: " + ", ".join(f"{name} {' and '.join(versions)}" for name, versions in found.items()) + "."


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _require_claims(rows: list[dict[str, Any]]) -> None:
    from ultrazoo import registry

    proved = {(row["case"].partition("/")[0], row["target"]) for row in rows}
    for row in registry.entries("attention"):
        if not row.builtin:
            continue
        for spec, _ in registry.find("attention", row.name).examples():
            for target in spec.traits().export:
                if (row.name, target) not in proved:
                    raise RuntimeError(f"export proofs: attention {row.name!r} claims {target}, which nothing proves")
