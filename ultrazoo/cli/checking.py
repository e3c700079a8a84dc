"""`ultrazoo check`: every problem of one or several recipes, each with path, line, rule and fix."""

from __future__ import annotations

from dataclasses import asdict

import typer

from ..errors import RecipeError
from . import common, out

NAME = "check"


def command(arguments: list[str] = common.RECIPES, json: bool = common.JSON) -> None:
    """Show all problems of recipes at once.

    The exit code is 2 when there is any.
    """
    from .. import api

    recipes, overrides = common.split(arguments, verb="check", many=True)
    bad = 0
    rows = []
    for recipe in recipes:
        try:
            problems = api.check(recipe, *overrides)
        except RecipeError as error:
            # what cannot even be read is a problem of this recipe; the others are still checked
            problems = list(error.problems)
        bad += bool(problems)
        rows.append({"recipe": recipe, "ok": not problems, "problems": [asdict(problem) for problem in problems]})
        if not json:
            out.echo(RecipeError(recipe, problems).render() if problems else f"{recipe}: ok")
    if json:
        out.emit(rows if len(rows) > 1 else rows[0])
    if bad:
        raise typer.Exit(2)
