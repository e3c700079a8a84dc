"""TorchScript by tracing. A legacy target: torch has deprecated it, C++ programs with libtorch still load it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.contract import export_form
from .kernels_seen import watching
from .sizes import inputs_at
from .targets import STEM, Job

SUFFIX = ".torchscript.pt"
SUMMARY = "a traced script for libtorch; deprecated by torch since 2.11, prefer pt2 or aoti"


def absent() -> str:
    """Why this target cannot be written here; empty when it can."""
    return ""


def write(job: Job, folder: Path) -> Path:
    device = next(job.model.parameters()).device
    inputs = inputs_at(job.ports, job.traced_at, job.dtype)
    placed = tuple(inputs[port.name].to(device) for port in job.ports)
    # every branch that the tracer warns of was taken by facts of the model, not of its inputs; the proof tells
    with torch.no_grad(), export_form(job.model, "torchscript"):
        traced = torch.jit.trace(job.model, placed, check_trace=False)
        path = folder / f"{STEM}{SUFFIX}"
        torch.jit.save(traced, str(path), _extra_files=dict(job.metadata))
    return path


def operators(path: Path) -> dict[str, int]:
    """Operators of the file by number, calls of submodules followed."""
    found: Counter[str] = Counter()
    blocks = [Loaded(path).module.inlined_graph]
    while blocks:
        for node in blocks.pop().nodes():
            blocks.extend(node.blocks())
            if node.kind().startswith("aten::"):
                found[node.kind().removeprefix("aten::")] += 1
    return dict(found.most_common())


class Loaded:
    """A script, run by torch's interpreter of scripts."""

    def __init__(self, path: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.module = torch.jit.load(str(path))
        self.seen: list[str] = []

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), watching(self.seen):
            return self.module(*inputs.values())  # type: ignore[no-any-return]

    def not_zero(self, names: Iterable[str]) -> list[str]:
        own = dict(self.module.named_parameters())
        return [name for name in names if name not in own or bool(own[name].any())]

    def replace(self, values: Mapping[str, Tensor]) -> None:
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)

    def facts(self) -> dict[str, Any]:
        return {"runtime": "torch.jit", "torch": torch.__version__, "kernels": sorted(set(self.seen))}
