"""`ultrazoo new-plugin vendor/name`: a package with one attention, its oracle and tests that pass as written."""

from __future__ import annotations

import keyword
import re
import tempfile
from importlib import resources
from pathlib import Path
from string import Template

import typer

from ..errors import OutputError, UsageError
from . import common, out

NAME = "new-plugin"
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "init.py.txt": "{module}/__init__.py",
    "block.py.txt": "{module}/block.py",
    "oracle.py.txt": "{module}/oracle.py",
    "test_block.py.txt": "tests/test_{module}.py",
}
"""Template → where it goes in the package."""

_NAME = re.compile(r"([a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)/([a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)")


def command(
    name: str = typer.Argument(help="vendor/name: what recipes will call the part.", metavar="VENDOR/NAME"),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="Directory to write; ./<vendor>-<name> unless given."
    ),
    json: bool = common.JSON,
) -> None:
    """Write a package that adds an attention.

    It has one block, its oracle in fp64, and tests that pass as written.
    """
    words = names(name)
    directory = output or Path(words["distribution"])
    files = write(directory, words)
    if json:
        out.emit({"name": name, "directory": str(directory), "files": [str(file) for file in files]})
        return
    out.echo("\n".join(str(directory / file) for file in files))
    out.note(f"next: pip install -e '{directory}[test]' && pytest {directory}/tests")


def names(name: str) -> dict[str, str]:
    """The words of the templates for a part called `name`; raises UsageError for a name that cannot be used."""
    matched = _NAME.fullmatch(name)
    if matched is None:
        lower = re.sub(r"[^a-z0-9/_-]+", "-", name.lower()).strip("-")
        fix = f"; for example {lower!r}" if _NAME.fullmatch(lower) else "; for example 'acme/frames'"
        raise UsageError(f"a plugin is called vendor/name, in lower case letters, digits, - and _, got {name!r}{fix}")
    from .. import __version__, registry

    for row in registry.entries("attention"):
        if row.name == name:
            raise UsageError(f"{name!r} is taken by {row.distribution} {row.version}".rstrip())
    slug = "_".join(matched.groups()).replace("-", "_")
    if keyword.iskeyword(slug):
        raise UsageError(f"{slug!r} is a word of Python's own; choose another name")
    return {
        "name": name,
        "module": slug,
        "distribution": slug.replace("_", "-"),
        "classname": "".join(part.title() for part in re.split("[-_]", matched.group(2))),
        "version": __version__,
    }


def write(directory: Path, words: dict[str, str]) -> list[Path]:
    """Write the package, whole or not at all; returns its files, relative to `directory`. Raises OutputError."""
    if directory.exists() or directory.is_symlink():
        raise OutputError(f"{directory} exists; choose another place with -o")
    parent = directory.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{directory.name}.") as scratch:
            fresh = Path(scratch) / "new"
            files = [_one(template, place, fresh, words) for template, place in FILES.items()]
            fresh.rename(directory)
    except OSError as error:
        raise OutputError(f"cannot write {directory}: {error.strerror or error}") from error
    return files


def _one(template: str, place: str, root: Path, words: dict[str, str]) -> Path:
    source = resources.files("ultrazoo.cli").joinpath("template", template).read_text(encoding="utf-8")
    path = Path(place.format(**words))
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(Template(source).substitute(words), encoding="utf-8")
    return path
