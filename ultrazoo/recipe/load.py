"""From a path, a name or a mapping to one recipe tree: `extends`, overrides, interpolation; nothing is looked up by name.

What a recipe's names mean is not asked here: `resolve` does that. What cannot even be read raises RecipeError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem, RecipeError
from ..options import got
from . import find, interpolate, overrides
from .merge import merge
from .tree import Map, Mark, from_plain, located, plain

MOST_FILES = 100
"""Most files one recipe may extend, counted as often as they are named."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as written, with everything it extends merged in and the overrides applied.

    `source` is what messages call it: the file's path, or ``(mapping)``. `file` is None for a mapping.
    """

    tree: Map
    source: str
    file: Path | None = None

    def data(self) -> dict[str, Any]:
        """The recipe as dicts and lists; loads back to the same recipe."""
        data: dict[str, Any] = plain(self.tree)
        # relative paths in the file mean something only beside it
        if self.name and "name" not in data:
            data = {"name": self.name, **data}
        weights = data.get("weights")
        if isinstance(weights, dict) and isinstance(weights.get("path"), str):
            weights["path"] = str(self.beside(weights["path"]))
        return data

    @property
    def name(self) -> str:
        """The recipe's name; that of its file where it does not say one."""
        written = self.tree.get("name")
        if isinstance(written, str):
            return written
        return self.file.stem if self.file is not None else "recipe"

    def beside(self, path: str, section: str = "weights", key: str = "path") -> Path:
        """A path written as ``section.key``: relative to the file that wrote it, to the current folder for an override."""
        node = self.tree.get(section)
        mark = node.marks.get(key, Mark()) if isinstance(node, Map) else Mark()
        folder = Path(mark.file).parent if mark.line is not None and mark.file else Path()
        return (folder / find.at_home(path)).absolute()


def load(source: str | Path | Mapping[str, Any], overriding: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path, name or as a mapping, and apply ``key=value`` overrides.

    Raises RecipeError with every problem for a missing file, text that is not YAML, a bad override, an interpolation that
    does not resolve, or an `extends` cycle.
    """
    if isinstance(source, Mapping):
        shown, file = "(mapping)", None
        tree, unfit = from_plain(source, Mark())
        if unfit:
            raise RecipeError(shown, unfit)
    elif isinstance(source, (str, Path)):
        file = find.find(source)
        shown = display(file)
        tree = find.read_file(file, shown)
    else:
        raise RecipeError("recipe", [Problem("", f"expected a path, a name or a mapping, got {got(source)}")])
    _require_mapping(tree, shown)
    if isinstance(overriding, str):
        overriding = [overriding]

    problems: list[Problem] = []
    tree = _Extending(problems).apply(tree, shown, file, [])
    tree, found = overrides.apply(tree, overriding)
    problems += found
    problems += interpolate.interpolate(tree)
    if problems:
        raise RecipeError(shown, located(problems, tree))
    return Recipe(tree, shown, file)


def display(file: Path) -> str:
    """A file as messages call it: relative to where we are when it is below."""
    try:
        return str(file.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        return str(file)


def _require_mapping(tree: Any, shown: str) -> None:
    if tree is None:
        raise RecipeError(shown, [Problem("", "the recipe is empty")])
    if not isinstance(tree, Map):
        raise RecipeError(shown, [Problem("", f"a recipe is a mapping, got {got(plain(tree))}")])


class _Extending:
    """Lays a recipe over everything it extends."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        self.files = 0

    def apply(self, tree: Map, shown: str, file: Path | None, chain: list[Path]) -> Map:
        """`tree` over its bases, in order; its own ``extends`` is gone. `chain` are the files that led here."""
        chain = [*chain, file.resolve()] if file is not None else chain
        mark = tree.marks.get("extends", Mark(shown))
        own = Map(tree.mark)
        for key, value in tree.items():
            if key != "extends":
                own.put(key, value, tree.marks[key])
        base = Map(tree.mark)
        for name in self.bases(tree.get("extends"), mark):
            below = self.base(name, mark, file, chain)
            if below is not None:
                base, found = merge(base, below)
                self.problems += found
        # a recipe is known by its own name and words, not by those of what it extends
        for key in ("name", "summary"):
            if key in base:
                del base[key], base.marks[key]
        result, found = merge(base, own)
        self.problems += found
        return result

    def bases(self, written: Any, mark: Mark) -> list[str]:
        bases = [written] if isinstance(written, str) else ([] if written is None else written)
        if isinstance(bases, list) and all(isinstance(one, str) for one in bases):
            return list(bases)
        self.report(f"expected a path or a recipe's name, or a list of them, got {got(plain(written))}", "", mark)
        return []

    def base(self, name: str, mark: Mark, file: Path | None, chain: list[Path]) -> Map | None:
        """The tree of one recipe that `file` extends, with everything it extends in turn."""
        self.files += 1
        if self.files > MOST_FILES:
            if self.files == MOST_FILES + 1:
                self.report(f"more than {MOST_FILES} files are extended", "", mark)
            return None
        try:
            found = find.find(name, file.parent if file is not None else None)
            shown = display(found)
            if found.resolve() in chain:
                circle = " → ".join(display(one) for one in [*chain[chain.index(found.resolve()) :], found])
                self.report(f"extends goes round in a circle: {circle}", "remove one of them", mark)
                return None
            tree = find.read_file(found, shown)
            _require_mapping(tree, shown)
            return self.apply(tree, shown, found, chain)
        except RecipeError as error:
            for problem in error.problems:
                if problem.file is not None:
                    self.problems.append(problem)
                else:
                    self.report(f"{name}: {problem.rule}", problem.fix, mark)
            return None

    def report(self, rule: str, fix: str, mark: Mark) -> None:
        self.problems.append(Problem("extends", rule, fix, mark.line, mark.file))
