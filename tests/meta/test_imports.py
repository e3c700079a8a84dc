"""Imports go one way, and the torch-free rooms stay torch-free: read from the source and seen at run time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ultrazoo"
ORDER = (
    "errors",
    "grid",
    "ports",
    "spec",
    "builtin",
    "tuned",
    "registry",
    "options",
    "catalog",
    "cost",
    "recipe",
    "api",
    "ops",
    "kernels",
    "attention",
    "backbones",
    "weights",
    "assemble",
    "checkpoints",
    "inplace",
    "analysis",
    "report",
    "export",
    "generate",
    "evaluate",
    "testing",
    "cli",
    "__main__",
)
TORCH_FREE = ORDER[: ORDER.index("ops")]
HEAVY = {"torch", "omegaconf", "torchvision", "diffusers", "timm", "matplotlib"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The first name below the package: a room or a single file; the root itself is the empty string."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(node: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    """Absolute dotted names that one import statement may load; `package` is where the file lives."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    if node.level:
        base = package[: len(package) - node.level + 1]
        prefix = ".".join([*base, *([node.module] if node.module else [])])
    else:
        prefix = node.module or ""
    for alias in node.names:
        yield f"{prefix}.{alias.name}"


def imports_of(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, inside functions as well."""
    package = ["ultrazoo", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node, package):
                yield node.lineno, name


def room_imported(name: str) -> str | None:
    """The room that a dotted name belongs to; None outside the package, the empty string for the root's own names."""
    parts = name.split(".")
    if parts[0] != "ultrazoo":
        return None
    if len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()):
        return parts[1]
    return ""


def upward(path: Path, names: Iterator[tuple[int, str]]) -> list[str]:
    """Imports of a file that point to a later room."""
    mine = ORDER.index(room_of(path))
    found = []
    for line, name in names:
        room = room_imported(name)
        if room and ORDER.index(room) > mine:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room_of(path) for path in sources()} - {""}
    assert rooms <= set(ORDER), f"not in the order of imports: {sorted(rooms - set(ORDER))}"


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p)], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert upward(path, imports_of(path)) == []


def test_an_upward_import_is_seen() -> None:
    """The test above can fail: relative, absolute, from a package and inside a function."""
    path = PACKAGE / "ops" / "rope.py"
    for line in (
        "from ..kernels import attend",
        "from .. import cli",
        "import ultrazoo.testing.case",
        "def f():\n    from ..attention.full import FullSpec",
    ):
        assert upward(path, imports_of(path, ast.parse(line))), line
    assert upward(path, imports_of(path, ast.parse("from ..grid import Grid\nfrom . import pool"))) == []


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import: not inside functions, not under ``if TYPE_CHECKING``."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)
        else:
            yield node


def heavy_at_import(path: Path, tree: ast.Module) -> list[str]:
    """Heavy libraries and torch rooms that a file of a torch-free room imports when it is imported."""
    found = []
    package = ["ultrazoo", *path.relative_to(PACKAGE).parts[:-1]]
    for node in top_level(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node, package):
                # the recipe loader may use omegaconf: it runs only when a recipe is read
                allowed = name.startswith("omegaconf") and room_of(path) == "recipe"
                room = room_imported(name)
                if (name.split(".")[0] in HEAVY and not allowed) or (room and room not in TORCH_FREE):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in sources() if room_of(p) in TORCH_FREE or room_of(p) == ""],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_torch_free_rooms_import_nothing_heavy(path: Path) -> None:
    assert heavy_at_import(path, ast.parse(path.read_text())) == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_free_rooms_load_without_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources()
        if room_of(path) in TORCH_FREE
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    assert run(code).strip() == "False"


CLI = """
import sys
sys.argv = {argv!r}
try:
    from ultrazoo.cli import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = sorted({{name.split('.')[0] for name in sys.modules}} & {{'torch', 'omegaconf'}})
print('LOADED', loaded)
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["list"], ["list", "attention"], ["list", "plugins"]], ids=" ".join
)
def test_quick_commands_load_neither_torch_nor_omegaconf(argv: list[str]) -> None:
    out = run(CLI.format(argv=["ultrazoo", *argv]))
    assert out.splitlines()[-1] == "LOADED []"


def test_import_ultrazoo_loads_neither_torch_nor_omegaconf() -> None:
    code = (
        "import sys, ultrazoo; print(ultrazoo.__version__, sorted({'torch', 'omegaconf', 'numpy'} & set(sys.modules)))"
    )
    assert run(code).split(" ", 1)[1].strip() == "[]"
