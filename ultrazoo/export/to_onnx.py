"""ONNX by way of torch's exported program, opset 23 or later, where attention is one operator."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .targets import STEM, Job

SUFFIX = ".onnx"
SUMMARY = "ONNX for onnxruntime and TensorRT; attention is one operator from opset 23 on"
OPSET = 23
OPSETS = (23, 24)
NEEDS = {"onnx": "1.21", "onnxscript": "0.5", "onnxruntime": "1.23"}
EXTERNAL_BYTES = 1 << 30
"""Weights of more than this lie in a file of their own: a message of the format holds 2 GB at most."""


def absent() -> str:
    """Why this target cannot be written or run here; empty when it can."""
    lacking = []
    for name, least in NEEDS.items():
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{name} is not installed")
            continue
        if _numbers(have) < _numbers(least):
            lacking.append(f"{name} is {have} and {least} is the oldest that will do")
    return f"{'; '.join(lacking)}; pip install 'ultrazoo[export]'" if lacking else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def require_opset(opset: int) -> None:
    """Raise UsageError for an opset that does not hold these models."""
    if opset < OPSET:
        raise UsageError(
            f"--opset {opset} is too old: attention is one operator from opset {OPSET} on; before, it becomes a product, a "
            "softmax and a product, with a tensor of queries by keys that grows with the square of a window"
        )
    if opset not in OPSETS:
        raise UsageError(f"--opset is one of {', '.join(map(str, OPSETS))}, got {opset}")


def write(job: Job, folder: Path) -> Path:
    import onnx_ir.passes.common as passes

    path = folder / f"{STEM}{SUFFIX}"
    with _quiet():
        # torch's own pass of rewrites takes longer than all else and is left to the runtime, which has better ones
        made = torch.onnx.export(
            job.program, dynamo=True, opset_version=job.opset or OPSET, optimize=False, verbose=False
        )
    assert made is not None
    model = made.model
    for step in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        step(model)
    for key, value in job.metadata.items():
        model.metadata_props[key] = value
    weights = sum(one.numel() * one.element_size() for one in job.model.parameters())
    made.save(path, external_data=weights > EXTERNAL_BYTES)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own account of its steps."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class Loaded:
    """A session of onnxruntime on the CPU."""

    def __init__(self, path: Path):
        import onnxruntime

        self.path = path
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = torch.get_num_threads()
        self.kept: list[Any] = []
        self._session: Any = None

    @property
    def session(self) -> Any:
        import onnxruntime

        if self._session is None:
            # what folds constants reads the weights of the file, not those that stand in for them
            without = ["ConstantFolding"] if self.kept else []
            self._session = onnxruntime.InferenceSession(
                str(self.path), self.options, providers=["CPUExecutionProvider"], disabled_optimizers=without
            )
        return self._session

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        due = [one.name for one in self.session.get_inputs()]
        found = self.session.run(None, {name: inputs[name].numpy() for name in due})
        return torch.from_numpy(found[0])

    def replace(self, values: Mapping[str, Tensor]) -> None:
        import onnxruntime

        for name, value in values.items():
            one = onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())
            self.options.add_initializer(name, one)
            # the session reads the memory when it is made
            self.kept.append(one)

    def facts(self) -> dict[str, Any]:
        import onnx
        import onnxruntime

        graph = onnx.load(str(self.path), load_external_data=False).graph
        attention = sorted({node.op_type for node in graph.node if "Attention" in node.op_type})
        return {
            "runtime": "onnxruntime",
            "onnxruntime": onnxruntime.__version__,
            "provider": self.session.get_providers()[0],
            "constants_folded": not self.kept,
            "kernels": attention,
        }
