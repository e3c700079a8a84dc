"""`ultrazoo export`: a model as one file for another runtime, proved equal to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ..errors import UsageError
from ..ports import EXPORTS
from . import common, out

NAME = "export"
DTYPES = ("float32", "float16", "bfloat16")


def command(
    arguments: list[str] = typer.Argument(
        None,
        help="A recipe by path or name, or the folder of a built model, then key=value overrides.",
        metavar="RECIPE [KEY=VALUE]...",
        autocompletion=common.complete_recipe,
    ),
    to: str | None = typer.Option(None, "--to", help=f"{', '.join(EXPORTS)}."),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="Directory to write; exports/NAME-TARGET unless given."
    ),
    dtype: str | None = typer.Option(None, "--dtype", help=f"{', '.join(DTYPES)}; the recipe's unless given."),
    dynamic: str | None = typer.Option(
        None,
        "--dynamic",
        help="Axes to leave open, of b,t,h,w,text; all unless given. The others get the recipe's size.",
    ),
    static: bool = typer.Option(False, "--static", help="Leave no axis open: one size, the recipe's."),
    opset: int | None = typer.Option(None, "--opset", help="Of ONNX; 23 unless given."),
    phase: str | None = typer.Option(
        None, "--phase", help="Of a recipe with steps: its steps, as 0-11, or one of them."
    ),
    proved: bool = typer.Option(
        True,
        "--verify/--no-verify",
        help="Run the file in a fresh process beside the model, at sizes not traced. Without --to: of this file.",
    ),
    device: str = typer.Option(
        "cpu", "--device", help="Where to trace and, for aoti, what to compile for: cpu, cuda …"
    ),
    force: bool = typer.Option(False, "--force", help="Replace the directory if it exists."),
    json: bool = common.JSON,
) -> None:
    """Export a model as one file, valid at every size within its bounds, and prove it.

    The file is loaded in a fresh process and compared with the model at sizes that it was not traced at. A file that is not
    equal ends in .unverified, and the exit code is 3. `ultrazoo export --verify FILE` repeats the proof of a file or of its
    directory.
    """
    if to is None:
        _again(arguments or [], json)
        return
    common.one_of(to, EXPORTS, "--to")
    common.one_of(dtype, DTYPES, "--dtype")
    if static and dynamic is not None:
        raise UsageError("give either --static or --dynamic, not both")
    (recipe,), overrides = common.split(arguments or [], verb="export")
    opened = [] if static else None if dynamic is None else _axes(dynamic)
    from .. import export

    place = output or Path("exports") / f"{_called(recipe)}-{to}"
    made = export.export(
        recipe,
        to,
        place,
        *overrides,
        dtype=dtype,
        dynamic=opened,
        opset=opset,
        phase=phase,
        verify=proved,
        force=force,
        device=common.checked_device(device),
        say=out.note,
    )
    _show(made.file, made.content, json)


def _called(source: str) -> str:
    """What an export of a recipe or of a built model is called: the file's name, or the directory's."""
    place = Path(source)
    return place.resolve().name if place.is_dir() else place.stem


def _axes(text: str) -> list[str]:
    found = [one.strip() for one in text.split(",") if one.strip()]
    if not found:
        raise UsageError("--dynamic names axes, as b,t,h,w,text; to leave none open use --static")
    return found


def _again(arguments: list[str], json: bool) -> None:
    """`ultrazoo export --verify FILE`: there is no --to, so the one argument is an exported file."""
    from ..weights.staging import EXPORTED

    how = "to prove a file again: ultrazoo export --verify FILE, the file or the directory that an export wrote"
    if len(arguments) != 1:
        raise UsageError(f"--to is missing: one of {', '.join(EXPORTS)}; {how}")
    place = Path(arguments[0])
    if not _is_export(place, EXPORTED):
        what = f"{place} is no exported file" if place.exists() else f"{place}: no such file"
        raise UsageError(f"{what}, and --to is missing: one of {', '.join(EXPORTS)}; {how}")
    from .. import export

    made = export.verify(place, say=out.note)
    _show(made.file, made.content, json)


def _is_export(place: Path, name: str) -> bool:
    folder = place if place.is_dir() else place.parent
    return (folder / name).is_file() or place.name.endswith((".onnx", ".pt2", ".torchscript.pt", ".unverified"))


def _show(file: Path, content: Mapping[str, Any], json: bool) -> None:
    if json:
        out.emit({"path": str(file), **{key: value for key, value in content.items() if key != "recipe"}})
        return
    bounds = ", ".join(
        f"{axis} {low}" if low == high else f"{axis} {low}-{high}" for axis, (low, high) in content["bounds"].items()
    )
    rows = [["sizes", bounds], *_inside(content), *_proof(content["proof"])]
    spent = ", ".join(f"{name.removesuffix('_s')} {seconds:g} s" for name, seconds in content["spent"].items())
    out.echo(f"{file}: {out.size(sum(one['bytes'] for one in _model_files(content)))}, {content['dtype']}")
    out.echo(out.table([*rows, ["time", spent]]))
    if content["target"] == "torchscript":
        out.note("note: torch has deprecated TorchScript; export to pt2 or aoti unless a program of yours needs it")


def _model_files(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The file and what it cannot do without; the inputs and answers of the proof are not of them."""
    return [one for name, one in content["files"].items() if name != "proof.safetensors"]


def _inside(content: Mapping[str, Any]) -> list[list[str]]:
    """What the file holds while it runs."""
    found = content["interior"]
    operators = sorted(found["operators"].items(), key=lambda one: -one[1])
    most = ", ".join(f"{name} {count}" for name, count in operators[:6])
    largest, square = found["largest"], found["faster_than_tokens"]
    at = "at " + _size(found["at"])
    grows = any(low < high for axis, (low, high) in content["bounds"].items() if axis in "thw")
    faster = (
        "no tensor does"
        if square is None
        else f"{square['shape']} of {square['operator']}, {out.size(square['bytes'])}"
    )
    return [
        ["operators", f"{sum(found['operators'].values())}: {most} …"],
        ["largest tensor", f"{largest['shape']} of {largest['operator']}, {out.size(largest['bytes'])} {at}"],
        ["grows faster than tokens", faster if grows else "the grid is fixed"],
        *_scores(content, at),
    ]


def _scores(content: Mapping[str, Any], at: str) -> list[list[str]]:
    """Is there a tensor of queries by keys, and how large may the grid be before it fills the memory?"""
    found = content["interior"]
    scores, fit = found["scores_without_flash"], found.get("scores_on_cpu")
    if scores is None:
        return []
    what = f"{scores['shape']}, {out.size(scores['bytes'])} {at}"
    if fit is not None:
        rows = [["scores", f"{what}: onnxruntime holds them whole on a CPU"]]
        memory = f"the {out.size(fit['memory_bytes'])} of this machine"
        if not fit["fits"]:
            rows.append(["", f"they do not fit {memory}"])
        if fit["largest_grid"] is not None:
            rows.append(["", f"they fit {memory} up to grid {'x'.join(map(str, fit['largest_grid']))}"])
        return rows
    flash = content["proof"].get("runtime", {}).get("flash")
    if flash and found["faster_than_tokens"] is not None:
        return [["scores", "the tensor above may be one; attention that is one operator runs as flash attention"]]
    if flash:
        return [["scores", f"no such tensor: the kernel is flash attention; without it, {what}"]]
    if flash is None:
        return [["scores", f"{what}, unless the kernel is flash attention: no proof was run that would tell"]]
    return [["scores", f"{what}: a softmax ran by itself, so they may be a tensor"]]


def _size(at: Mapping[str, int]) -> str:
    grid = "x".join(str(at[axis]) for axis in ("t", "h", "w") if axis in at)
    return f"batch {at['b']}, grid {grid}"


def _proof(found: Mapping[str, Any]) -> list[list[str]]:
    if found["holds"] is None:
        return [["proof", "none was asked for"]]
    worst = max(case["ratio"] for case in found["cases"])
    runtime = found["runtime"]
    kernels = ", ".join(runtime["kernels"]) or "none of attention"
    version = runtime.get(runtime["runtime"], runtime.get("torch", ""))
    rows = [
        ["proof", f"error ratio at most {worst:.1e} at {len(found['cases'])} sizes, allowed {found['allowed']:.2g}"],
        ["ran in", f"{runtime['runtime']} {version}, attention: {kernels}"],
    ]
    if found["stand_ins"]:
        count = len(found["stand_ins"])
        rows.append(["weights", f"{count} that are all zero had other values in the proof: a fresh model answers zero"])
    return rows
