"""`ultrazoo build`: from a recipe to a directory with the plan, every weight, a report and a model card."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..cost import units
from ..errors import UsageError, near
from . import common, out
from .progress import bar

if TYPE_CHECKING:
    from ..recipe import Plan

NAME = "build"
DEVICES = ("cpu", "meta")


def command(
    arguments: list[str] = common.RECIPE,
    output: Path | None = typer.Option(None, "-o", "--output", help="Directory to write; outputs/<name> unless given."),
    force: bool = typer.Option(False, "--force", help="Replace the directory if it exists."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Stop after the plan."),
    device: str = typer.Option("cpu", "--device", help="cpu, or meta: build without allocating and write nothing."),
    json: bool = common.JSON,
) -> None:
    """Build a recipe into a directory.

    It is checked and priced; every parameter is made or loaded and written, with the plan, a report and a model card.
    """
    if device not in DEVICES:
        hint = near(device, DEVICES) or "weights are made on the CPU, the same everywhere"
        raise UsageError(f"--device is one of {', '.join(DEVICES)}, got {device!r}; {hint}")
    from .. import api

    (recipe,), overrides = common.split(arguments, verb="build")
    plan = api.plan(recipe, *overrides)
    if dry_run:
        _show(plan, json)
    elif device == "meta":
        _meta(plan, json)
    else:
        _write(plan, output or Path("outputs") / plan.name, force, json)


def _show(plan: Plan, json: bool) -> None:
    if json:
        from .plandata import data

        out.emit(data(plan))
        return
    from .plantext import text

    out.echo(text(plan))


def _meta(plan: Plan, json: bool) -> None:
    """Build on the meta device: every module and shape is real, no tensor is."""
    from .. import assemble

    start = time.perf_counter()
    model = assemble.build(plan, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "name": plan.name,
        "hash": plan.hash,
        "device": "meta",
        "parameters": count,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if json:
        out.emit(facts)
    else:
        out.echo(f"{plan.name} builds: {units.count(count)} parameters, nothing allocated, nothing written")


def _write(plan: Plan, directory: Path, force: bool, json: bool) -> None:
    from .. import assemble

    start = time.perf_counter()
    if not json:
        out.note(f"building {plan.name} ({out.size(plan.totals.weight_bytes)} of weights) into {directory}")
    with bar("writing") as advance:
        report = assemble.build_directory(plan, directory, force=force, progress=advance, extra_files=pages(plan))
    seconds = time.perf_counter() - start
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    if json:
        out.emit(
            {
                "name": plan.name,
                "hash": plan.hash,
                "directory": str(directory),
                "parameters": plan.totals.parameters,
                "seconds": round(seconds, 3),
                "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
                "weights": report.data() if report is not None else None,
            }
        )
        return
    if report is not None:
        out.echo(str(report))
    out.echo(out.table([[str(directory / name), out.size(size)] for name, size in sizes.items()], right="lr"))
    out.echo(f"built {plan.name} in {units.duration(seconds)}")


def pages(plan: Plan, origin: Mapping[str, Any] | None = None) -> Mapping[str, Callable[[], bytes]]:
    """The report and the model card, written beside the weights; made when they are asked for.

    `origin` says where the numbers come from, where not from the recipe.
    """
    from ..report import card, html

    return {"report.html": lambda: html(plan).encode(), "README.md": lambda: card(plan, origin=origin).encode()}
