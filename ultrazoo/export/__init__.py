"""Export: one file per model, valid at every size it was exported for, proved equal to the model at others than the traced.

`run.export` and `run.verify` do it; `engine.Engine` calls a file. One module per target: `to_torchscript`, `to_onnx`,
`to_pt2`, `to_aoti`.
"""

from __future__ import annotations

from .engine import Engine
from .run import Exported, export, verify

__all__ = ["Engine", "Exported", "export", "verify"]
