"""`ultrazoo plan`: what a recipe stands for, what it costs and where it fits; several recipes side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import OutputError, ProblemsError, UsageError
from . import common, out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..recipe import Plan

NAME = "plan"


def command(
    arguments: list[str] = common.RECIPES,
    json: bool = common.JSON,
    layers: bool = typer.Option(
        False, "--layers", help="One plan as text: one row per layer instead of runs of equal layers."
    ),
    coverage: bool = typer.Option(False, "--coverage", help="Also: after how many layers all tokens can have met."),
    plot: Path | None = typer.Option(None, "--plot", help="Draw the plans side by side into this .png or .svg file."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file of --plot."),
) -> None:
    """Check and price recipes; several stand side by side.

    Several plans always show their coverage, one only with --coverage.
    """
    recipes, overrides = common.split(arguments, verb="plan", many=True)
    form = picture_form(plot, force)
    if layers and (len(recipes) > 1 or plot is not None):
        raise UsageError("--layers is for one plan as text, without --plot: plans side by side have no rows of layers")
    plans = _plans(recipes, overrides)
    if len(plans) == 1 and plot is None:
        _one(plans[0], json, layers, coverage)
        return
    from ..analysis import comparison

    compared = comparison.compare(plans)
    if plot is not None:
        from ..analysis.plot import plot as draw

        write_picture(plot, draw(compared, form))
    if json:
        out.emit(comparison.rows(compared))
    else:
        out.echo(comparison.text(compared))
    if plot is not None:
        out.note(str(plot))


class _Wrong(ProblemsError):
    """The problems of several recipes."""

    def __init__(self, errors: Sequence[ProblemsError]):
        self.errors = errors
        super().__init__("", [problem for one in errors for problem in one.problems])

    def render(self) -> str:
        return "\n".join(dict.fromkeys(map(str, self.errors)))


def _plans(recipes: Sequence[str], overrides: Sequence[str]) -> list[Plan]:
    """Plans of all recipes; raises the problems of all that have some."""
    from .. import api

    plans, errors = [], []
    for recipe in recipes:
        try:
            plans.append(api.plan(recipe, *overrides))
        except ProblemsError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else _Wrong(errors)
    return plans


def _one(plan: Plan, json: bool, layers: bool, coverage: bool) -> None:
    found = None
    if coverage:
        from ..analysis.coverage import coverage as follow

        found = follow(plan.resolved.sites, plan.resolved.attention, plan.resolved.written)
    if json:
        from .plandata import data

        out.emit(data(plan, found))
        return
    from .plantext import text

    out.echo(text(plan, every_layer=layers, coverage=found))


def picture_form(plot: Path | None, force: bool) -> str:
    """The form of a picture, from the name of its file; known before anything is computed."""
    if plot is None:
        if force:
            raise UsageError("--force overwrites the file of --plot, and there is none")
        return ""
    form = plot.suffix.removeprefix(".").casefold()
    if form not in ("png", "svg"):
        raise UsageError(f"--plot takes a file that ends in .png or .svg, got {str(plot)!r}")
    if plot.exists() and not force:
        raise OutputError(f"{plot} exists already; --force overwrites it")
    return form


def write_picture(file: Path, content: bytes) -> None:
    """Write the file of --plot. Raises OutputError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error
