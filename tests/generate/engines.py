"""Tiny models of Wan with random numbers, how they are exported, and `generate --engine` as typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ultrazoo
from tests.cli.program import Ran, here
from tests.generate.runs import FULL, NATIVE, WINDOWS, recipe

MIXED = {"0": WINDOWS["*"], "1": {"name": "full"}}
BACKBONE = {"name": "wan", **NATIVE, "layers": 2}
SCHEDULE = {"steps": {"0": FULL}}


def design(attention: Any = MIXED, more: Any = None, **changes: Any) -> dict[str, Any]:
    return recipe(attention, backbone={**BACKBONE, **changes}, **(more or {}))


MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "model": (design(), 1),
    "other": (design(), 2),
    "half": (design(more={"dtype": "float16"}), 1),
    "brain": (design(more={"dtype": "bfloat16"}), 1),
    "stepped": (design(WINDOWS, SCHEDULE), 1),
    "stepped other": (design(WINDOWS, SCHEDULE), 2),
}
"""Recipes of models with random numbers, and the seed of these."""

FILES: dict[str, tuple[Any, dict[str, Any]]] = {
    "onnx": ("model", {"to": "onnx"}),
    "pt2": ("model", {"to": "pt2"}),
    "aoti": ("model", {"to": "aoti"}),
    "half": ("half", {"to": "onnx"}),
    "brain": ("brain", {"to": "pt2"}),
    "script": ("model", {}),
    "other": ("other", {}),
    "first": ("stepped", {"phase": "0"}),
    "rest": ("stepped", {"phase": "1-2"}),
    "rest of another": ("stepped other", {"phase": "1-2"}),
    "fresh": (design(), {}),
    "one size": (design(text_tokens=512), {"dynamic": []}),
    "short text": (design(text_tokens=16), {"dynamic": ["h", "w"]}),
    "image": (design(more={"video": {"width": 64, "height": 64}}), {}),
    "wide": (design(channels=8, text_dim=16), {}),
    "strided": (design(strides=[4, 16, 16]), {}),
    "dit": (ultrazoo.load("dit_tiny"), {}),
}
"""What is exported, and how; as a script unless said otherwise, which is made fastest."""

Give = Callable[[str], Path]
"""The folder of a name."""


def ran(capsys: Any, folder: Path, *files: Path, more: tuple[str, ...] = (), out: str = "o.mp4") -> Ran:
    engines = [word for one in files for word in ("--engine", str(one))]
    return here(capsys, "generate", *more, *engines, "--pipeline", str(folder), "-o", out, "--prompt", "a red ball")
