"""`ultrazoo schema`: the JSON Schema of recipes, made from the registry."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ..errors import OutputError
from . import out

NAME = "schema"


def command(
    output: Path | None = typer.Option(None, "-o", "--output", help="Write to this file instead of stdout."),
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from ..recipe import json_schema

    data = json_schema()
    if output is None:
        out.emit(data)
        return
    try:
        output.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from error
    out.note(f"wrote {output}")
