"""What is installed: a typed wheel with the recipes inside, exact versions without addresses, one version everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ultrazoo
from tests.docs.shell import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    # no isolation: hatchling is part of the environment, so nothing is fetched
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_code_recipes_and_types(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"ultrazoo/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ultrazoo").rglob("*.py")}
    assert modules <= names
    assert "ultrazoo/py.typed" in names
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "ultrazoo" / "cli" / "template").iterdir()}
    assert {name for name in templates if not name.endswith("__pycache__")} <= names
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "ultrazoo" / "analysis" / "captures").rglob("*.*")}
    assert shipped
    assert shipped <= names
    top = {name.split("/")[0] for name in names}
    assert top == {"ultrazoo", f"ultrazoo-{ultrazoo.__version__}.dist-info"}


def test_the_wheel_s_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"ultrazoo-{ultrazoo.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "ultrazoo = ultrazoo.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    wanted = "timm diffusers train search export evaluate kernels flash-attn testing docs dev all"
    assert set(wanted.split()) <= extras


def test_constraints_are_exact_and_name_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line and not line.startswith("#")]
    wrong = [row for row in rows if not re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version [<>]=? "3\.\d+")?', row)]
    assert not wrong
    pinned = {re.split("==", row)[0].lower().replace("_", "-") for row in rows}
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(item for name in extras if name != "flash-attn" for item in extras[name])]
    names = {re.split(r"[\[<>=! ]", item)[0].lower() for item in asked} - {"ultrazoo"}
    assert names <= pinned, f"not pinned: {sorted(names - pinned)}"


def test_all_is_every_extra_that_installs_as_a_wheel() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.removeprefix("ultrazoo[").removesuffix("]").split(","))
    assert named == set(extras) - {"all", "flash-attn"}


def test_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ultrazoo.__version__}\n" in citation


def test_make_names_its_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for target in ("demo", "test", "lint", "docs", "bench", "proof", "gpu-test", "clean"):
        assert re.search(rf"make {target}\s", done.stdout), f"make help does not name {target}"


def test_ci_runs_lint_and_tests() -> None:
    script = Path(ROOT / ".ci" / "run")
    text = script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in text
    assert {"step make lint", "step make test", "step make docs"} <= set(text.splitlines())
