"""Recipes of a tiny Wan, and the latents of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ultrazoo.generate.latents import Latents
from ultrazoo.generate.run import generate
from ultrazoo.generate.wanted import Wanted

SIZES = {"video": {"width": 64, "height": 64, "frames": 9}, "sampling": {"steps": 3, "guidance": 4.0}}
FULL = {"*": {"name": "full"}}
WINDOWS = {"*": {"name": "branched", "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}}}}}
NATIVE = {"dim": 48, "layers": 3, "heads": 2, "ffn_dim": 32, "channels": 4, "text_dim": 12, "time_dim": 16}


def recipe(attention: Any, **more: Any) -> dict[str, Any]:
    return {"name": "tiny", **SIZES, "attention": attention, "dtype": "float32", **more}


def latents(source: Any, folder: Path, out: Path, lines: list[str] | None = None, **more: Any) -> torch.Tensor:
    """What is sampled. `lines` gets what is said."""
    said = lines if lines is not None else []
    wanted = Wanted("a red ball", out.with_suffix(".mp4"), **more)
    return Latents.load(generate(source, folder, wanted, say=said.append).latents).video[0]
