"""Fresh environments that see this one's torch: a venv whose .pth names our site-packages, and packages to install."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """A venv of its own."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    def run(self, *arguments: object, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's python; `extra` are environment variables."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NO_COLOR", "FORCE_COLOR")}
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=cwd or self.root,
            env={**kept, "OMP_NUM_THREADS": "1", **extra},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=580,
        )

    def ultrazoo(self, *arguments: object, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "ultrazoo", *arguments, cwd=cwd, **extra)

    def install(self, *packages: Path) -> None:
        """Install source trees with pip's rules; nothing is downloaded, the build backend is our own."""
        flags = ["--quiet", "--offline", "--no-deps", "--no-build-isolation", "--python", str(self.python)]
        done = subprocess.run(
            [sys.executable, "-m", "uv", "pip", "install", *flags, *map(str, packages)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def fresh(root: Path) -> Environment:
    """Make a venv at `root` that imports our packages and this checkout without holding a copy of either."""
    done = subprocess.run(
        [sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(root)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (own,) = root.glob("lib/python*/site-packages")
    (own / "parent.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    made = Environment(root)
    shown = made.run("-c", "import torch; print(torch.__file__)")
    assert not shown.stdout.startswith(str(root)), shown
    assert not list(own.glob("torch*"))
    return made


def package(folder: Path, distribution: str, points: Mapping[str, str], code: str, version: str = "1.0") -> Path:
    """Write the source of a distribution with one module and entry points of kind attention; returns its folder."""
    module = distribution.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(textwrap.dedent(code))
    lines = "\n".join(f'"{name}" = "{module}:{attribute}"' for name, attribute in points.items())
    (folder / "pyproject.toml").write_text(
        f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "{version}"
description = "a package for a test"

[project.entry-points."ultrazoo.attention"]
{lines}

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""
    )
    return folder


GOOD = """
    from dataclasses import dataclass
    from typing import ClassVar
    from ultrazoo.attention.full import FullSpec

    @dataclass(frozen=True, kw_only=True)
    class Mine(FullSpec):
        name: ClassVar[str] = "{name}"
        contract: ClassVar[int] = {contract}
"""


def good(name: str, contract: int = 1) -> str:
    """Source of a module whose `Mine` is a working attention called `name`."""
    return textwrap.dedent(GOOD).format(name=name, contract=contract)
