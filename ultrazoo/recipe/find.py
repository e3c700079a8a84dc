"""Where recipes are: files by path, the shipped ones by name, those of installed packages as ``vendor/name``.

A package offers recipes by an entry point of the group ``ultrazoo.recipes``: its name is the vendor, its value the package
whose folder holds the ``.yaml`` files. Nothing of that package is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from .. import __version__, registry
from ..errors import Problem, RecipeError, listed, near
from . import text

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe that can be addressed by name. `problem` says why it cannot be used."""

    name: str
    path: str
    summary: str = ""
    distribution: str = "ultrazoo"
    version: str = ""
    problem: str = ""

    def data(self) -> dict[str, str]:
        """The row as plain data."""
        return {key: str(value) for key, value in vars(self).items()}


def shipped_folder() -> Path:
    """The folder of the recipes that come with ultrazoo: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def at_home(path: str | Path) -> Path:
    """A path with ``~`` and ``~user`` written out; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def find(source: str | Path, base: Path | None = None) -> Path:
    """The file behind a path or a recipe's name; relative paths are looked up in `base` (default: where we are).

    Raises RecipeError when there is none, with the near name.
    """
    given = str(source)
    path = at_home(source)
    if base is not None and not path.is_absolute():
        path = base / path
    if isinstance(source, Path) or given.endswith(SUFFIXES):
        return _file(path, given)
    if path.is_file():
        return path
    found = [row for row in _named() if row.name == given]
    if len(found) > 1:
        who = listed(sorted(f"{row.distribution} {row.version}" for row in found))
        raise RecipeError(given, [Problem("", f"recipe {given!r} is claimed by {who}", "uninstall all but one")])
    if found:
        return Path(found[0].path)
    if path.is_dir():
        return _file(path, given)
    names = [row.name for row in _named()]
    fix = near(given, names) or f"recipes are {listed(names)}, or give the path of a .yaml file"
    raise RecipeError(given, [Problem("", f"no recipe file and no recipe is called {given!r}", fix)])


def recipes() -> list[RecipeEntry]:
    """Every recipe that has a name, shipped ones first, with its summary."""
    rows = list(_named())
    claims = [row.name for row in rows]
    return [_described(row, claims.count(row.name)) for row in rows]


def _file(path: Path, given: str) -> Path:
    if path.is_file():
        return path
    rule = "is a directory, not a recipe file" if path.is_dir() else "no such file"
    folder = path.parent
    beside = [one.name for one in folder.glob("*.y*ml")] if folder.is_dir() else []
    hint = near(path.name, beside) if not path.is_dir() else ""
    raise RecipeError(given, [Problem("", rule, hint)])


def _named() -> Iterator[RecipeEntry]:
    for path in _yaml_files(shipped_folder()):
        yield RecipeEntry(path.stem, str(path), version=__version__)
    for point in registry.recipe_points():
        dist = point.dist
        distribution = str(dist.metadata["Name"]) if dist else "unknown"
        version = str(dist.version) if dist else ""
        folder = _folder(point)
        if folder is None:
            problem = f"{distribution} {version}: no folder {point.value!r}"
            yield RecipeEntry(f"{point.name}/", "", "", distribution, version, problem)
            continue
        for path in _yaml_files(folder):
            yield RecipeEntry(f"{point.name}/{path.stem}", str(path), "", distribution, version)


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())


def _folder(point: EntryPoint) -> Path | None:
    """The folder of a package by its dotted name, without importing it or its parents."""
    first, *rest = point.value.partition(":")[0].split(".")
    try:
        found = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    for root in (found.submodule_search_locations or []) if found else []:
        folder = Path(root, *rest)
        if folder.is_dir():
            return folder
    return None


def _described(row: RecipeEntry, claims: int) -> RecipeEntry:
    if row.problem:
        return row
    problem = f"{row.name!r} is claimed {claims} times; uninstall all but one package" if claims > 1 else ""
    summary: Any = ""
    try:
        tree = read_file(Path(row.path), row.path)
        summary = tree.get("summary", "") if isinstance(tree, dict) else ""
    except RecipeError as error:
        problem = problem or f"cannot be read: {error.problems[0].rule}"
    return RecipeEntry(row.name, row.path, str(summary), row.distribution, row.version, problem)


def read_file(path: Path, shown: str) -> Any:
    """The tree of a recipe file, called `shown` in messages. Raises RecipeError when it cannot be read."""
    try:
        size = path.stat().st_size
        if size > text.LARGEST_FILE:
            rule = f"{size} bytes are not a recipe: at most {text.LARGEST_FILE}"
            raise RecipeError(shown, [Problem("", rule)])
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(shown, [Problem("", f"cannot be read: {error.strerror or error}")]) from None
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"not YAML: byte {error.start} is not UTF-8 text"
        raise RecipeError(shown, [Problem("", rule, "recipes are UTF-8 text files")]) from None
    return text.read(content, shown)
