"""`ultrazoo evaluate`: measure video files, alone or against a reference run with the same seed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..evaluate import table
from . import common, out

if TYPE_CHECKING:
    from ..evaluate.run import Evaluation

NAME = "evaluate"


def command(
    videos: list[Path] = typer.Argument(help="Video files.", metavar="VIDEO..."),
    reference: list[Path] = typer.Option(
        [],
        "--reference",
        help="The video to compare with, of the same seed and size; once for each VIDEO.",
        metavar="REF",
    ),
    metrics: str | None = typer.Option(
        None,
        "--metrics",
        help=f"Measures to compute, with commas: {', '.join(table.NAMES)}; all that can be computed unless given.",
    ),
    networks: Path | None = typer.Option(
        None, "--networks", help="Directory of feature networks: lpips.*, fvd.*, frames.*. Nothing is downloaded."
    ),
    patch: int = typer.Option(224, "--patch", help="Pixels per side of the patches of hd_fvd: the network's input."),
    clip: int = typer.Option(16, "--clip", help="Frames of the clips of hd_fvd."),
    device: str = typer.Option("cpu", "--device", help="Where to compute."),
    json: bool = common.JSON,
) -> None:
    """Measure videos, alone or against references.

    PSNR, SSIM and LPIPS against a reference run, flicker, temporal consistency, and UltraGen's HD-MSE, HD-LPIPS and HD-FVD.
    """
    from ..evaluate.run import evaluate

    asked = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]

    def note(number: int, count: int, path: Path) -> None:
        out.note(f"reading {path} ({number + 1} of {count})")

    found = evaluate(
        videos,
        reference,
        metrics=asked,
        networks=networks,
        patch_px=patch,
        clip_frames=clip,
        device=device,
        progress=note if sys.stderr.isatty() else None,
    )
    if json:
        out.emit(found.data())
    else:
        out.echo(text(found))


def text(found: Evaluation) -> str:
    """Tables for people: one per video, one of the measures of the sets, and what was left out."""
    parts = []
    for video in found.videos:
        against = f", against {video['reference']}" if video["reference"] else ""
        head = f"{video['video']}: {video['width']}x{video['height']}, {video['frames']} frames{against}"
        parts.append(f"{head}\n{_table(video['measures'])}" if video["measures"] else head)
    if found.sets:
        parts.append("all videos against all references\n" + _table(found.sets))
    if found.left_out:
        parts.append(out.table([[name, reason] for name, reason in found.left_out.items()], ["left out", "because it"]))
    return "\n\n".join(parts)


def _table(measures: dict[str, dict[str, Any]]) -> str:
    has_reference = any("reference" in one for one in measures.values())
    rows = []
    for name, one in measures.items():
        row = table.row(name)
        cells = [name, _number(one["value"])]
        if has_reference:
            cells.append(_number(one["reference"]) if "reference" in one else "")
        rows.append([*cells, row.unit, row.better, _remarks(one)])
    middle = ["reference"] if has_reference else []
    return out.table(
        rows, ["measure", "value", *middle, "unit", "better", "more"], indent="  ", right="lrr" if middle else "lr"
    )


def _remarks(one: dict[str, Any]) -> str:
    """Everything else that a measure says."""
    said = []
    for key, value in one.items():
        if key in ("value", "reference", "note"):
            continue
        if isinstance(value, dict):
            shown = ", ".join(f"{inner}: {_number(number)}" for inner, number in value.items())
        elif isinstance(value, list):
            shown = " and ".join(map(str, value))
        else:
            shown = _number(value)
        said.append(f"{key.replace('_', ' ')} {shown}")
    return "; ".join([*said, *([one["note"]] if "note" in one else [])])


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"
