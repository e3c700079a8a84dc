"""One proof of the matrix: a model with random weights, exported, run in a fresh process, and what was found as a row."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ultrazoo
from benchmarks.rows import commit
from tests.backbones.models import randomise
from tests.export.cases import Case
from ultrazoo.export import export
from ultrazoo.export.proof import cases_in, ratio

SHARE = 0.01
"""How much of the answer the attention must make up for its proof to say anything; allowed are errors of 1e-5."""


def prove(case: Case, target: str, folder: Path) -> dict[str, Any]:
    """Export the case's model into `folder` and compare. Raises CheckFailed where the file is not the model."""
    model = randomise(ultrazoo.build(case.recipe(target))).eval()
    made = export(model, target, folder)
    proof = made.content["proof"]
    assert proof["holds"]
    assert not proof["stand_ins"], "the weights are random: none is zero"
    sizes = [found["sizes"] for found in proof["cases"]]
    assert {one["b"] for one in sizes} == {1, 2}
    names = [port["name"] for port in made.content["inputs"]]
    share = min(_shares(model, names, folder))
    assert share > SHARE, f"{case.id}: without its attention the answer changes by {share:.1e} only"
    # the third size is the ragged one
    ragged = proof["cases"][2]
    assert ragged["sizes"] != made.content["traced_at"]
    runtime = proof["runtime"]
    return {
        "hash": made.content["hash"],
        "ragged": list(grid_of(ragged["sizes"])),
        "ratio": float(f"{ragged['ratio']:.1e}"),
        "worst": float(f"{max(made.ratios):.1e}"),
        "kernels": runtime["kernels"],
        "commit": commit(),
        "torch": torch.__version__,
        **({"onnxruntime": importlib.metadata.version("onnxruntime")} if target == "onnx" else {}),
    }


def grid_of(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """(T, H, W) of the sizes of a proof; an image has no axis of time."""
    return (sizes.get("t", 1), sizes["h"], sizes["w"])


def _shares(model: nn.Module, names: Sequence[str], folder: Path) -> Iterator[float]:
    """At each size of the proof, by how much the model's answer changes without its attention."""
    with torch.no_grad(), _without_attention(model):
        for inputs, due in cases_in(folder):
            yield ratio(model(*(inputs[name] for name in names)), due)


@contextmanager
def _without_attention(model: Any) -> Iterator[None]:
    def silent(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    hooks = [block.attention.register_forward_hook(silent) for block in model.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
