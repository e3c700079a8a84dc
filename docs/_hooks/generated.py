"""Pages made at build time: every registered part with its options, and every command with its flags.

mkdocs calls `on_files`; the two writers below return Markdown and import ultrazoo only then.
"""

from __future__ import annotations

import json
from typing import Any

PARTS = "reference/parts.md"
COMMANDS = "reference/commands.md"

INTRODUCTION = (
    "Made from the registry when these pages were built: what `ultrazoo list` and `ultrazoo describe` print for the "
    "built-in parts. An option without a default must be given."
)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the documentation."""
    from mkdocs.structure.files import File

    for path, write in ((PARTS, parts), (COMMANDS, commands)):
        files.append(File.generated(config, path, content=write()))
    return files


def parts() -> str:
    """Markdown: one section per kind, one entry per registered name, its options as declared."""
    from ultrazoo import registry

    lines = [
        "# Parts",
        "",
        INTRODUCTION,
    ]
    for kind in registry.KINDS:
        rows = [entry for entry in registry.entries(kind) if entry.builtin]
        if not rows:
            continue
        lines += ["", f"## {kind}"]
        for entry in rows:
            lines += _part(entry, registry.find(kind, entry.name))
    return "\n".join(lines) + "\n"


def _part(entry: Any, spec: Any) -> list[str]:
    from ultrazoo.catalog import kernel_facts
    from ultrazoo.cli.describing import kernel_facts as rows

    lines = ["", f"### {entry.name}", "", f"{sentence(entry.summary)}"]
    facts = []
    if entry.aliases:
        facts.append("also called " + ", ".join(f"`{alias}`" for alias in entry.aliases))
    if spec.source:
        facts.append(f"source: {spec.source}")
    if getattr(spec, "presets", None):
        facts.append("presets: " + ", ".join(f"`{name}`" for name in spec.presets))
    if facts:
        lines[-1] += " " + sentence("; ".join(facts))
    if entry.kind == "kernel":
        lines += ["", *(f"- {name}: {words}" for name, words in rows(kernel_facts(spec)))]
    return lines + option_tables(spec)


def option_tables(cls: type) -> list[str]:
    """A table of the options of a class, then one for each group of options inside it."""
    from ultrazoo.catalog import option_rows
    from ultrazoo.cli.describing import groups

    rows = option_rows(cls)
    if not rows:
        return ["", "No options."]
    lines = _table(rows)
    for title, group in groups(rows):
        path, _, name = title.partition(" ")
        lines += ["", f"`{path}: {name}`" if name else f"`{path}`"]
        lines[-1] += f": {sentence(_paragraph(group.about))}" if group.about else ""
        lines += _table(group.options)
    return lines


def _table(rows: Any) -> list[str]:
    from ultrazoo.cost.units import ranged

    if not rows:
        return []
    lines = ["", "| option | takes | default | |", "| --- | --- | --- | --- |"]
    for row in rows:
        default = "" if row.required else f"`{_default(row.default)}`"
        cells = [f"`{row.name}`", ranged(row.takes, row.bounds), default, row.doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def _default(value: Any) -> str:
    text = json.dumps(value, default=str).strip('"')
    return text if len(text) <= 60 else text[:57] + "..."


def _paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`")


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def commands() -> str:
    """Markdown: every verb with its arguments and flags, from the program itself."""
    from ultrazoo.cli.app import Settings, program

    group = program(Settings())
    lines = [
        "# Commands",
        "",
        sentence(group.help or ""),
        "",
        "```text",
        "ultrazoo [--debug] [--plugin FILE.py] COMMAND ...",
        "```",
    ]
    if group.epilog:
        lines += ["", group.epilog]
    for name, command in group.commands.items():
        lines += ["", f"## {name}", "", (command.help or "").strip()]
        rows = [_parameter(parameter) for parameter in command.params]
        lines += ["", "| | |", "| --- | --- |", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        head = parameter.metavar or parameter.name.upper()
    else:
        head = ", ".join([*parameter.opts, *parameter.secondary_opts])
    text = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
    return f"| `{head}` | {text} |"
