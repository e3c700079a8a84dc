"""ONNX by way of torch's exported program, opset 23 or later, where attention is one operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .onnx_forms import translations
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
    # torch's own pass of rewrites takes longer than all else and is left to the runtime, which has better ones
    made = torch.onnx.export(
        job.program,
        dynamo=True,
        opset_version=job.opset or OPSET,
        optimize=False,
        verbose=False,
        custom_translation_table=translations(),
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


def operators(path: Path) -> dict[str, int]:
    """Operators of the file by number, those inside its functions and branches with them."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    found: Counter[str] = Counter()
    lists = [model.graph.node, *(one.node for one in model.functions)]
    while lists:
        for node in lists.pop():
            found[node.op_type] += 1
            lists.extend(one.g.node for one in node.attribute if one.HasField("g"))
    return dict(found.most_common())


class Loaded:
    """A session of onnxruntime on the CPU."""

    def __init__(self, path: Path):
        import onnxruntime

        self.path = path
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = torch.get_num_threads()
        self._source: str | bytes = str(path)
        self._session: Any = None

    @property
    def session(self) -> Any:
        import onnxruntime

        if self._session is None:
            self._session = onnxruntime.InferenceSession(self._source, self.options, providers=["CPUExecutionProvider"])
            self._source = str(self.path)
        return self._session

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        due = [one.name for one in self.session.get_inputs()]
        found = self.session.run(None, {name: inputs[name].numpy() for name in due})
        return torch.from_numpy(found[0])

    def not_zero(self, names: Iterable[str]) -> list[str]:
        import onnx

        model = onnx.load(str(self.path), load_external_data=False)
        own = {one.name: one for one in model.graph.initializer}
        folder = str(self.path.parent)
        return [name for name in names if name not in own or onnx.numpy_helper.to_array(own[name], folder).any()]

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Before the first run: the values stand in the graph, so that the runtime optimises it as it does any other."""
        import onnx

        model = onnx.load(str(self.path), load_external_data=False)
        left = dict(values)
        for one in model.graph.initializer:
            if one.name in left:
                one.CopyFrom(onnx.numpy_helper.from_array(left.pop(one.name).numpy(), one.name))
        if left:
            raise ValueError(f"the file has no weights called {', '.join(left)}")
        self._source = model.SerializeToString()
        # weights in a file beside it are found from there
        self.options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.path.parent)
        )
        self._session = None

    def facts(self) -> dict[str, Any]:
        import onnx
        import onnxruntime

        graph = onnx.load(str(self.path), load_external_data=False).graph
        attention = sorted({node.op_type for node in graph.node if "Attention" in node.op_type})
        return {
            "runtime": "onnxruntime",
            "onnxruntime": onnxruntime.__version__,
            "provider": self.session.get_providers()[0],
            "kernels": attention,
        }
