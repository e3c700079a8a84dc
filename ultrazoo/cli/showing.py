"""`ultrazoo show`: who can influence a chosen query, which blocks see which, when all have met, what layers cost."""

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
    layer: int | None = typer.Option(None, "--layer", help="Look at this layer only; coverage stays the model's."),
    block: str | None = typer.Option(None, "--block", help="Tokens t,h,w of a block; 64 blocks at most unless given."),
    output: Path | None = typer.Option(None, "-o", "--output", help="Write pictures into this directory instead."),
    form: str = typer.Option("png", "--format", help="Of the pictures: png or svg."),
    force: bool = typer.Option(False, "--force", help="Overwrite pictures that exist."),
    json: bool = common.JSON,
) -> None:
    """Draw who sees whom, when all have met, and what layers cost.

    Who can influence a query, which blocks of keys each block of queries sees, after how many layers every token can have
    influenced every other. As text, or as pictures with -o.
    """
    from .. import api
    from ..analysis.show import FORMS, show

    if form not in FORMS:
        raise UsageError(f"--format is {' or '.join(FORMS)}, got {form!r}; {near(form, FORMS)}".rstrip("; "))
    (recipe,), overrides = common.split(arguments, verb="show")
    plan = api.plan(recipe, *overrides)
    shown = show(plan, query, layer=layer, block=block)
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
        out.note(shown.coverage.text())


def _unicode() -> bool:
    return (sys.stdout.encoding or "").casefold().replace("-", "") == "utf8"
