"""Where the numbers of an exported model come from, as export.json says it: whoever runs the file has no model to ask."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..analysis.capture import fresh

SAMPLES = 64


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Whether a model's numbers are still those of its seed (`fresh`), the report of those that were loaded (`origin`),
    and a digest by which two files of the same numbers are known."""
    origin: Mapping[str, Any] = getattr(model, "origin", None) or {}
    return {"fresh": fresh(model), "origin": dict(origin), "digest": digest(model)}


def digest(model: nn.Module) -> str:
    """Sha256 over the names of all parameters and `SAMPLES` numbers of each, evenly spread; 64 hex digits."""
    found = hashlib.sha256()
    for name, one in sorted(model.named_parameters()):
        flat = one.detach().reshape(-1)
        found.update(f"{name} {tuple(one.shape)}".encode())
        # without numbers the last line takes none
        at = torch.arange(min(SAMPLES, flat.numel()), device=flat.device) * flat.numel() // SAMPLES
        found.update(flat[at].double().cpu().numpy().tobytes())
    return found.hexdigest()
