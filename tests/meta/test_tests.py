"""Tests that test something: no comparison thrown away, no test without an assertion."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [*(ROOT / "tests").rglob("*.py"), *(ROOT / "ultrazoo/testing").rglob("*.py")]
    + [p for d in ("plugins", "benchmarks") for p in (ROOT / d).rglob("*.py") if ".venv" not in p.parts]
)
# calls whose result is the finding: as a statement they check nothing
COMPARISONS = {"allclose", "isclose", "equal", "array_equal", "is_close", "isfinite", "all", "any", "gradcheck"}
# calls that raise when the finding is bad
ASSERTING = {"raises", "warns", "deprecated_call", "fail"}


def name_of(call: ast.Call) -> str:
    """The last name of what is called: ``torch.testing.assert_close`` → ``assert_close``."""
    target = call.func
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def thrown_away(tree: ast.AST) -> Iterator[int]:
    """Lines where a comparison or an ``==`` stands alone as a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            value = node.value
            inner = [value, *(value.values if isinstance(value, ast.BoolOp) else [])]
            for one in inner:
                if isinstance(one, ast.Compare) or (isinstance(one, ast.Call) and name_of(one) in COMPARISONS):
                    yield node.lineno


def asserting_helpers(tree: ast.Module) -> set[str]:
    """Functions of the file that assert, directly or through one another."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    known: set[str] = set()
    while True:
        found = {f.name for f in functions if f.name not in known and asserts(f, known)}
        if not found:
            return known
        known |= found


def asserts(function: ast.AST, helpers: set[str]) -> bool:
    """Whether the body holds an assertion or calls something that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert | ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = name_of(node)
            if name in ASSERTING or name in helpers or name.startswith(("assert_", "check_returncode")):
                return True
    return False


def toothless(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every test function that cannot fail by an assertion."""
    helpers = {name for name in asserting_helpers(tree) if not name.startswith("test_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not asserts(node, helpers):
            yield node.lineno, node.name


def findings(look: Callable[[ast.Module], Iterator[object]]) -> dict[str, list[object]]:
    """What `look` finds, by file."""
    found = {str(path.relative_to(ROOT)): list(look(ast.parse(path.read_text()))) for path in FILES}
    return {name: lines for name, lines in found.items() if lines}


def test_no_comparison_is_thrown_away() -> None:
    assert findings(thrown_away) == {}


def test_every_test_asserts() -> None:
    assert findings(toothless) == {}


def test_the_two_rules_can_fail() -> None:
    bad = ast.parse(
        "def test_a():\n    torch.allclose(x, y)\ndef test_b():\n    run()\ndef test_c():\n    x == y\n"
        "def test_d():\n    a and torch.equal(x, y)\n"
    )
    assert list(thrown_away(bad)) == [2, 6, 8]
    assert [name for _, name in toothless(bad)] == ["test_a", "test_b", "test_c", "test_d"]
    good = ast.parse(
        "def agree(x):\n    assert x\ndef both(x):\n    agree(x)\ndef test_a():\n    both(1)\n"
        "def test_b():\n    with pytest.raises(ValueError):\n        f()\ndef test_c():\n    assert torch.equal(x, y)\n"
    )
    assert list(thrown_away(good)) == []
    assert list(toothless(good)) == []
