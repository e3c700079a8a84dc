"""`ultrazoo plan`: what a recipe stands for, what it costs and where it fits; several recipes side by side."""

from __future__ import annotations

import typer

from . import common, out

NAME = "plan"


def command(
    arguments: list[str] = common.RECIPES,
    json: bool = common.JSON,
    layers: bool = typer.Option(False, "--layers", help="One row per layer instead of runs of equal layers."),
) -> None:
    """Check and price recipes; several stand side by side."""
    from .. import api

    recipes, overrides = common.split(arguments, verb="plan", many=True)
    plans = [api.plan(recipe, *overrides) for recipe in recipes]
    if len(plans) > 1:
        from ..analysis import comparison

        if json:
            out.emit(comparison.rows(plans))
        else:
            comparison.show(plans)
        return
    if json:
        out.emit(plans[0].to_json())
        return
    from .plantext import text

    out.echo(text(plans[0], every_layer=layers))
