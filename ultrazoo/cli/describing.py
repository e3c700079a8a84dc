"""`ultrazoo describe NAME`: summary, source, start, options and what may stand in them, limits, export targets, a kernel's
facts and a minimal recipe."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..cost.units import ranged
from . import common, out

if TYPE_CHECKING:
    from ..catalog import KernelFacts, OptionGroup, OptionRow

NAME = "describe"


def command(
    name: str = typer.Argument(
        help="A registered name or alias, or a choice of an option.", autocompletion=common.complete_name
    ),
    kind: str | None = typer.Option(
        None, "--kind", help="Which kind of part, or which option's choice, where a name is used twice."
    ),
    json: bool = common.JSON,
) -> None:
    """Say everything known about one part, or about one choice of an option."""
    from ..catalog import describe

    found = describe(name, kind)
    if json:
        out.emit(found.data())
        return
    facts = [["from", found.origin]]
    facts += [["source", found.source or "-"]] if found.source or not found.of else []
    facts += [["choice of", place] for place in found.of]
    facts += kernel_facts(found.kernel) if found.kernel else []
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
        out.echo("\n" + option_table(found.options))
    for title, group in groups(found.options):
        out.echo("\n" + ": ".join(part for part in (title, group.summary) if part))
        if group.options:
            out.echo(option_table(group.options, "  "))
    if found.limits:
        out.echo("\n" + "\n".join(["limits", *(f"  - {limit}" for limit in found.limits)]))
    if found.recipe is not None:
        out.echo("\nminimal recipe\n" + yaml(found.recipe, "  "))


def option_table(rows: Sequence[OptionRow], indent: str = "") -> str:
    """Options as text, one a line."""
    shown = [
        [row.name, "required" if row.required else _value(row.default), ranged(row.takes, row.bounds), row.doc]
        for row in rows
    ]
    return out.table(shown, ["option", "default", "takes", "meaning"], indent)


def groups(rows: Sequence[OptionRow], under: str = "") -> Iterator[tuple[str, OptionGroup]]:
    """Every group of options in `rows` with its title, ``path`` or ``path choice``, those inside it after it."""
    for row in rows:
        path = f"{under}.{row.name}" if under else row.name
        for group in row.groups:
            yield f"{path} {group.name}".rstrip(), group
            yield from groups(group.options, path)


def kernel_facts(facts: KernelFacts) -> list[list[str]]:
    """What a kernel states, as rows of a name and words."""
    low, high = facts.head_dims
    return [
        ["devices", ", ".join(facts.devices)],
        ["dtypes", ", ".join(facts.dtypes)],
        ["head sizes", f"{low} to {high}" + (f" that {facts.head_step} divides" if facts.head_step > 1 else "")],
        ["takes", ", ".join(["q, k, v", *facts.takes])],
        *([["needs", ", ".join(facts.needs)]] if facts.needs else []),
        ["result", "exact" if facts.exact else "lossy; runs only by name"],
        ["backward", "yes" if facts.backward else "no"],
        ["exportable", "yes" if facts.exportable else "no"],
    ]


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
