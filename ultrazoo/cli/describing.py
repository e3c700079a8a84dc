"""`ultrazoo describe NAME`: summary, source, start, options, limits, export targets and a minimal recipe."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from typing import Any

import typer

from ..cost.units import ranged
from . import common, out

NAME = "describe"


def command(
    name: str = typer.Argument(help="A registered name or alias.", autocompletion=common.complete_name),
    kind: str | None = typer.Option(None, "--kind", help="Which kind of part, where a name is used twice."),
    json: bool = common.JSON,
) -> None:
    """Say everything known about one part."""
    from ..catalog import describe

    found = describe(name, kind)
    if json:
        out.emit(found.data())
        return
    facts = [["from", found.origin], ["source", found.source or "-"]]
    facts += [["also called", ", ".join(found.aliases)]] if found.aliases else []
    facts += [["start", found.start]] if found.start else []
    facts += [["presets", ", ".join(found.presets)]] if found.presets else []
    facts += [["exports to", ", ".join(found.export)]] if found.export else []
    facts += [["also a", ", ".join(f"{kind} (--kind {kind})" for kind in found.others)]] if found.others else []
    out.echo(out.style(f"{found.kind} {found.name}", "bold") + f": {found.summary}")
    out.echo(out.table(facts, indent="  "))
    if found.formula:
        out.echo("\nformula\n  " + found.formula)
    if found.about:
        out.echo("\n" + found.about)
    if found.options:
        rows = []
        for row in found.options:
            default = "required" if row.required else _value(row.default)
            rows.append([row.name, default, ranged(row.takes, row.bounds), row.doc])
        out.echo("\n" + out.table(rows, ["option", "default", "takes", "meaning"]))
    if found.limits:
        out.echo("\n" + "\n".join(["limits", *(f"  - {limit}" for limit in found.limits)]))
    if found.recipe is not None:
        out.echo("\nminimal recipe\n" + yaml(found.recipe, "  "))


def _value(value: Any) -> str:
    return value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)


def yaml(data: Mapping[str, Any], indent: str = "") -> str:
    """A mapping as recipe YAML: its own keys on lines of their own, what is below a second level in one line."""
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping) and key == "attention":
            lines.append(f"{indent}{key}:")
            lines += [f"{indent}  {_key(inner)}: {_flow(node)}" for inner, node in value.items()]
        else:
            lines.append(f"{indent}{key}: {_flow(value)}")
    return "\n".join(lines)


def _key(key: str) -> str:
    return jsonlib.dumps(key) if not key.replace("_", "").isalnum() or key[0].isdigit() else key


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str) and not value.replace("_", "").replace("/", "").isalnum():
        return jsonlib.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) else jsonlib.dumps(value)
