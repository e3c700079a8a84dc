"""What export.json says of a file's inside: its operators, its largest tensors, and whether scores fit the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipe import Plan
from .interior import interior
from .measured import measured
from .scores import memory_bytes, room
from .sizes import AXES, Bounds
from .targets import Job, target


def look(job: Job, to: str, file: Path, plan: Plan) -> dict[str, Any]:
    """``at`` the sizes that bytes are given for, ``operators`` of the file by number, the ``largest`` tensor, the largest
    that grows ``faster_than_tokens`` (None: no tensor does), the ``scores_without_flash`` that a kernel which holds queries
    by keys would hold; for ONNX ``scores_on_cpu``: how onnxruntime's kernel, which is one of those, fits this machine."""
    at = recipe_sizes(plan, job.bounds)
    own = target(to)
    if job.program is None:
        device = next(job.model.parameters()).device
        script = own.Loaded(file).module
        found, at = measured(script, job.ports, job.bounds, job.dtype, device)
    else:
        found = interior(job.program, job.ports, job.bounds, at)
    data: dict[str, Any] = {"at": at, **found.data()}
    if hasattr(own, "operators"):
        data["operators"] = own.operators(file)
    if to == "onnx" and found.scores_at is not None:
        data["scores_on_cpu"] = room(found.scores_at, job.bounds, at, plan.totals.weight_bytes, memory_bytes())
    return data


def recipe_sizes(plan: Plan, bounds: Bounds) -> dict[str, int]:
    """The recipe's own size, where the bounds allow it: batch 1, its grid, its text."""
    own = dict(zip(AXES, (1, *plan.grid, getattr(plan.resolved.backbone, "text_tokens", 1)), strict=True))
    return {axis: min(max(own[axis], one.low), one.high) for axis, one in bounds.items()}
