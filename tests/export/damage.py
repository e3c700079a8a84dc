"""Exported files that are not what they were: other weights inside, or bytes gone wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from ultrazoo.export import record

Change = Callable[[Tensor], Tensor]


def change_weight(file: Path, name: str, change: Change) -> None:
    """Write the file again with one weight changed."""
    if file.name.endswith(".torchscript.pt"):
        script = torch.jit.load(str(file))
        weight = dict(script.named_parameters())[name]
        with torch.no_grad():
            weight.copy_(change(weight))
        torch.jit.save(script, str(file))
    elif file.name.endswith(".exported.pt2"):
        program = torch.export.load(file)
        with torch.no_grad():
            program.state_dict[name].copy_(change(program.state_dict[name]))
        torch.export.save(program, file)
    else:
        model = onnx.load(str(file))
        (weight,) = [one for one in model.graph.initializer if one.name == name]
        value = torch.from_numpy(onnx.numpy_helper.to_array(weight).copy())
        weight.CopyFrom(onnx.numpy_helper.from_array(change(value).numpy(), name))
        onnx.save(model, str(file))


def sealed(folder: Path) -> None:
    """Let export.json say that its files are what they are now, so that only a proof can tell."""
    edit(folder, lambda content: [_sealed(folder, name, one) for name, one in content["files"].items()])


def _sealed(folder: Path, name: str, one: dict[str, Any]) -> None:
    path = folder / name
    one |= {"bytes": path.stat().st_size, "sha256": record.digest(path)}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change export.json."""
    path = folder / record.FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
