"""`ultrazoo check`: every problem of one or several recipes, each with path, line, rule and fix; or what a checkpoint is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..cost import units
from ..errors import RecipeError, UsageError
from . import common, out
from .progress import bar

if TYPE_CHECKING:
    from ..checkpoints.verify import Verified

NAME = "check"
NOT_HELD = 3


def command(
    arguments: list[str] = typer.Argument(
        None,
        help="Recipes by path or name, then key=value overrides (applied to each). With --weights: one, or none.",
        metavar="[RECIPE]... [KEY=VALUE]...",
        autocompletion=common.complete_recipe,
    ),
    weights: str | None = typer.Option(
        None,
        "--weights",
        help="A checkpoint: print its digests and what it is, and hold it against the recipe.",
        metavar="PATH",
    ),
    digest: str | None = typer.Option(
        None,
        "--digest",
        help="With --weights: the SHA-256 that one of its files or its tensors must have.",
        metavar="HEX",
    ),
    json: bool = common.JSON,
) -> None:
    """Show all problems of recipes at once, or verify a checkpoint.

    The exit code is 2 when a recipe has problems, 3 when a checkpoint does not fit or has another digest.
    """
    if weights is not None:
        _weights(weights, arguments or [], digest, json)
        return
    if digest is not None:
        raise UsageError("--digest goes with --weights")
    _recipes(arguments or [], json)


def _recipes(arguments: list[str], json: bool) -> None:
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


def _weights(path: str, arguments: list[str], digest: str | None, json: bool) -> None:
    from .. import api
    from ..checkpoints.verify import verify

    plan = None
    if arguments:
        (recipe,), overrides = common.split(arguments, verb="check --weights")
        plan = api.plan(recipe, *overrides)
    if digest is not None and not (len(digest) == 64 and set(digest.lower()) <= set("0123456789abcdef")):
        raise UsageError(f"--digest is a SHA-256 of 64 hexadecimal digits, got {digest!r}")
    with bar("reading") as advance:
        found = verify(path, plan, progress=advance)
    known = {found.tensors_sha256, *(sha256 for _, _, sha256 in found.files)}
    same = None if digest is None else digest.lower() in known
    if json:
        out.emit({**found.data(), **({} if same is None else {"digest": digest, "digest_holds": same})})
    else:
        _show(found, digest, same)
    if not found.fits or same is False:
        raise typer.Exit(NOT_HELD)


def _show(found: Verified, digest: str | None, same: bool | None) -> None:
    rows = [[f"sha256 {sha256}", out.size(size), Path(name).name] for name, size, sha256 in found.files]
    out.echo(out.table([*rows, [f"sha256 {found.tensors_sha256}", "", "the tensors, in any layout"]], right="lrl"))
    behind = f", keys behind the prefix {found.prefix!r}" if found.prefix else ""
    out.echo(f"format {found.format or 'unknown'}{behind}")
    kinds = ", ".join(f"{units.count(count)} {dtype}" for dtype, count in found.dtypes.items())
    out.echo(f"{found.tensors} tensors, {units.count(found.parameters)} parameters: {kinds}")
    if found.match is not None:
        data = found.data()
        out.echo(f"fits {found.model}: {data['reused']} tensors have their place")
        for kind in ("new", "dropped"):
            for row in data[kind]:
                out.echo(f"  {kind:<9} {row}")
    for note in found.notes:
        out.echo(f"  note: {note}")
    if found.problem:
        out.echo(found.problem)
    if same is not None:
        out.echo(f"digest {digest}: {'holds' if same else 'is none of the above'}")
