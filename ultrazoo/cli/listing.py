"""`ultrazoo list`: what is registered, from tables and package metadata; `--check` imports plugins in isolation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from ..errors import CheckFailed, UsageError, near
from ..registry import KINDS, Entry, entries
from . import common, out

if TYPE_CHECKING:
    from ..kernels import KernelRow

NAME = "list"
SUBJECTS = (*KINDS, "plugins", "kernels", "recipes")


def command(
    what: str = typer.Argument(
        "", help=f"One of: {', '.join(SUBJECTS)}.", metavar="[WHAT]", autocompletion=common.complete_kind
    ),
    check: bool = typer.Option(
        False, "--check", help="plugins: import each in its own process and report what happens."
    ),
    seconds: float = typer.Option(60.0, "--timeout", help="Time limit of one import, in seconds.", min=0.1),
    tune: bool = typer.Option(
        False, "--tune", help="kernels: time every exact one here and keep the order in the user's cache."
    ),
    forget: bool = typer.Option(False, "--forget", help="kernels: delete the measured order."),
    json: bool = common.JSON,
) -> None:
    """List parts, plugins, kernels or recipes.

    Nothing is imported for it, kernels and --check aside.
    """
    if what and what not in SUBJECTS:
        hint = near(what, SUBJECTS) or f"it is one of {', '.join(SUBJECTS)}"
        raise UsageError(f"nothing to list under {what!r}; {hint}")
    if check and what != "plugins":
        raise UsageError("--check belongs to `ultrazoo list plugins`")
    if (tune or forget) and what != "kernels":
        raise UsageError("--tune and --forget belong to `ultrazoo list kernels`")
    if tune and forget:
        raise UsageError("--tune writes the measured order and --forget deletes it; give one of them")
    if what == "plugins":
        _plugins(check, seconds, json)
    elif what == "kernels":
        _kernels(json, tune, forget)
    elif what == "recipes":
        _recipes(json)
    else:
        _parts(entries(what or None), json, kinds=not what)


def _parts(rows: Sequence[Entry], json: bool, *, kinds: bool) -> None:
    if json:
        out.emit([_data(row) for row in rows])
        return
    shown = [[row.kind] * kinds + [row.name, row.start or "-", _origin(row), _summary(row)] for row in rows]
    out.echo(out.table(shown, ["kind"] * kinds + ["name", "start", "from", "summary"]))
    if kinds and sys.stdout.isatty():
        out.note("more: ultrazoo list plugins | kernels | recipes, ultrazoo describe NAME")


def _data(row: Entry) -> dict[str, Any]:
    return {**asdict(row), "aliases": list(row.aliases)}


def _origin(row: Entry) -> str:
    if row.builtin:
        return "built-in"
    return f"{row.distribution} {row.version}".rstrip() + (f" ({row.status})" if row.status != "local" else "")


def _summary(row: Entry) -> str:
    if row.problem:
        return row.problem
    return row.summary + (f" (also: {', '.join(row.aliases)})" if row.aliases else "")


def _plugins(check: bool, seconds: float, json: bool) -> None:
    from ..recipe.find import recipes

    rows = [row for row in entries() if not row.builtin]
    if check:
        from .isolated import checked

        rows = checked(rows, seconds)
    packs = [row for row in recipes() if row.distribution != "ultrazoo"]
    if json:
        out.emit([_data(row) for row in rows] + [{"kind": "recipe", **row.data()} for row in packs])
    elif rows or packs:
        shown = [[row.name, row.kind, f"{row.distribution} {row.version}".rstrip(), _status(row)] for row in rows]
        shown += [
            [row.name, "recipe", f"{row.distribution} {row.version}".rstrip(), row.problem or row.summary]
            for row in packs
        ]
        out.echo(out.table(shown, ["name", "kind", "from", "status"]))
    else:
        out.note("no plugin is installed; `ultrazoo new-plugin vendor/name` writes one")
    broken = [row.name for row in rows if row.problem]
    if check and broken:
        raise CheckFailed(f"{len(broken)} of {len(rows)} plugins cannot be used: {', '.join(dict.fromkeys(broken))}")


def _status(row: Entry) -> str:
    return row.status if row.status.startswith("broken") or not row.problem else f"{row.status}: {row.problem}"


def _recipes(json: bool) -> None:
    from ..recipe.find import recipes

    rows = recipes()
    if json:
        out.emit([row.data() for row in rows])
        return
    out.echo(
        out.table(
            [[row.name, row.distribution, row.problem or row.summary] for row in rows], ["name", "from", "summary"]
        )
    )


def _kernels(json: bool, tune: bool, forget: bool) -> None:
    from .. import tuned
    from ..kernels import table

    if tune:
        _tune(json)
        return
    if forget:
        out.note(
            f"deleted {tuned.path()}" if tuned.forget() else f"nothing was measured: {tuned.path()} does not exist"
        )
    rows = table()
    if json:
        out.emit([asdict(row) for row in rows])
        return
    out.echo(kernel_table(rows))
    found = tuned.summary()
    if found["order"] == "measured":
        out.echo(f"\nauto follows the order measured on {found['measured']} ({tuned.path()})")


def _tune(json: bool) -> None:
    from ..kernels.tune import tune

    rows, file = tune(out.note)
    if json:
        out.emit({"file": str(file), "measured": [asdict(row) for row in rows]})
        return
    shown = [[row.key, row.kernel, f"{1e3 * row.seconds:.2f}", f"{row.error:.1e}"] for row in rows]
    out.echo(out.table(shown, ["for", "kernel", "ms", "error"]))
    out.echo(f"\nwritten to {file}; `ultrazoo list kernels --forget` deletes it")


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """The rows of `kernels.table()` as text."""
    shown = []
    for row in rows:
        facts = [row.summary, "exact" if row.exact else "lossy"] + ([] if row.backward else ["no backward"])
        facts += [f"takes {', '.join(row.takes)}"] if row.takes else []
        shown.append([row.name, "no" if row.reason else "yes", "/".join(row.devices), row.reason or "; ".join(facts)])
    return out.table(shown, ["kernel", "here", "devices", "why not, or what it is"])
