"""What goes into a backbone's forward, and what a model can be exported to: facts without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXPORTS = ("torchscript", "onnx", "pt2", "aoti")
"""What a model can be exported to: a traced script, ONNX, torch's exported program, a compiled AOTInductor package."""


@dataclass(frozen=True)
class Port:
    """One input of a backbone's forward, batch first.

    `shape` gives per dimension a size, or an axis (``b``, ``t``, ``h``, ``w`` in tokens, ``text``) and how many of this
    dimension go to one of it. `kind`: values that any model gets (``noise``), a ``timestep`` of the 0..1000 scale in fp32,
    or a ``label`` below `below`.
    """

    name: str
    shape: tuple[int | tuple[str, int], ...]
    kind: Literal["noise", "timestep", "label"] = "noise"
    below: int = 0
