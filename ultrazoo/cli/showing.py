"""`ultrazoo show`: who can influence a chosen query, per branch and layer parity, and what every layer costs."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..errors import OutputError, UsageError, near
from . import common, out

NAME = "show"
WIDTH = 100
"""Columns of the text where no terminal says how many there are."""


def command(
    arguments: list[str] = common.RECIPE,
    query: str | None = typer.Option(None, "--query", help="Token t,y,x to look at; near the middle unless given."),
    output: Path | None = typer.Option(None, "-o", "--output", help="Write pictures into this directory instead."),
    form: str = typer.Option("png", "--format", help="Of the pictures: png or svg."),
    force: bool = typer.Option(False, "--force", help="Overwrite pictures that exist."),
    json: bool = common.JSON,
) -> None:
    """Draw who sees whom, and what layers cost.

    As text, or as pictures with -o.
    """
    from .. import api
    from ..analysis.show import FORMS, show

    if form not in FORMS:
        raise UsageError(f"--format is {' or '.join(FORMS)}, got {form!r}; {near(form, FORMS)}".rstrip("; "))
    (recipe,), overrides = common.split(arguments, verb="show")
    plan = api.plan(recipe, *overrides)
    shown = show(plan, query)
    if output is None:
        if json:
            out.emit(shown.data())
        else:
            out.echo(shown.text(width=min(out.width(), WIDTH), unicode=_unicode()))
        return
    if not force and output.is_dir() and any(output.glob(f"{plan.name.replace('/', '_')}_*.{form}")):
        raise OutputError(f"{output} holds pictures of {plan.name} already; --force overwrites them")
    files = shown.save(output, form)
    if json:
        out.emit({**shown.data(), "files": [str(file) for file in files]})
    else:
        out.echo("\n".join(str(file) for file in files))


def _unicode() -> bool:
    return (sys.stdout.encoding or "").casefold().replace("-", "") == "utf8"
