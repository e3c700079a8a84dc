"""`ultrazoo probe`: recipes ranked on captured queries, keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import UltrazooError
from . import common, out
from .planning import picture_form, write_picture

if TYPE_CHECKING:
    from ..analysis.probe import Probe

NAME = "probe"
DTYPES = ("bfloat16", "float16", "float32", "float64")


def command(
    arguments: list[str] = common.RECIPES,
    capture: Path | None = typer.Option(None, "--capture", help="Directory that `ultrazoo capture` wrote."),
    layers: str = typer.Option("*", "--layers", help="Captured layers to look at, as keys of recipes: 0-2, first3."),
    steps: str = typer.Option("*", "--steps", help="Captured sampling steps to look at, in the same form."),
    device: str = typer.Option("cpu", "--device", help="cpu, cuda, cuda:1 …"),
    dtype: str | None = typer.Option(
        None, "--dtype", help=f"{', '.join(DTYPES)}; float32 on a CPU and the capture's own elsewhere unless given."
    ),
    queries: int = typer.Option(256, "--queries", help="Sampled queries of each item that recall looks at.", min=1),
    detail: bool = typer.Option(False, "--detail", help="One row per layer, step and head."),
    plot: Path | None = typer.Option(None, "--plot", help="Draw error against cost into this .png or .svg file."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file of --plot."),
    json: bool = common.JSON,
) -> None:
    """Rank recipes on a model's own queries and keys.

    Replays each recipe's attentions on a capture: error against full attention, recall of softmax mass, visited pairs, time.
    Without a capture nothing is ranked.
    """
    recipes, overrides = common.split(arguments, verb="probe", many=True)
    form = picture_form(plot, force)
    common.one_of(dtype, DTYPES, "--dtype")
    from .. import assemble
    from ..analysis import probe_table
    from ..analysis.probe import probe

    found = probe(
        recipes,
        capture,
        *overrides,
        layers=layers,
        steps=steps,
        device=common.checked_device(device),
        dtype=None if dtype is None else assemble.DTYPES[dtype],
        queries=queries,
        say=out.note,
    )
    if plot is not None and any(row.whole for row in found.rows):
        from ..analysis.probe_picture import plot as draw

        write_picture(plot, draw(found, form))
    if json:
        out.emit(probe_table.data(found))
    else:
        _show(found, detail)
    if not any(row.points for row in found.rows):
        raise UltrazooError("no recipe could be replayed on this capture; the reasons are above")
    if plot is not None:
        out.note(str(plot))


def _show(found: Probe, detail: bool) -> None:
    from ..analysis import probe_table

    if detail:
        out.echo(out.table(probe_table.detail(found), probe_table.DETAIL, right=" rrrr rrrr"))
        out.echo()
    out.echo(out.table(probe_table.summary(found), probe_table.HEADERS, right=" rrrrrr"))
    out.echo()
    for line in probe_table.remarks(found):
        out.echo(line)
