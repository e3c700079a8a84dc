"""What is rewritten on the way to a file gives the same, in fewer passes over the tokens."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ultrazoo.export.aoti_forms import loose_biases
from ultrazoo.testing import error_ratio


class _Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 0)])
def test_biases_stand_beside_matmuls_of_full_precision(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    model = _Linears().to(dtype)
    x = torch.randn(3, 5, 6, dtype=dtype)
    program = torch.export.export(model, (x,))
    assert loose_biases(program) == count
    linears = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert sum(len(node.args) == 3 and node.args[2] is not None for node in linears) == 1 - count
    found, due = program.module()(x), model(x)
    assert error_ratio(found, due) < 1e-6
    assert error_ratio(due - model.first.bias.sum(), due) > 1e-2


class _Mixed(nn.Module):
    def forward(self, x: Tensor, y: Tensor, index: Tensor, other: Tensor) -> Tensor:
        mixed = torch.lerp(x, y, torch.sigmoid(y))
        one, two = torch.addcmul(x, y, mixed), torch.addcmul(x, y, mixed, value=0.5)
        # one index along one axis, and two beside each other, which torch's own translation makes
        return one[:, index].sum(dim=(1, 2)) + two[:, other, other].sum(dim=1, keepdim=True)


def test_onnx_needs_one_gather_for_one_index() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from ultrazoo.export.onnx_forms import translations

    torch.manual_seed(0)
    x, y = torch.randn(2, 7, 7, 5), torch.randn(2, 7, 7, 5)
    index, other = torch.tensor([[0, 6, 3], [2, 2, 1]]), torch.tensor([4, 0, 6])
    model = _Mixed()
    program = torch.export.export(model, (x, y, index, other))
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=23,
        optimize=False,
        verbose=False,
        custom_translation_table=translations(),
    )
    file = io.BytesIO()
    onnx.save(made.model_proto, file)
    kinds = Counter(node.op_type for node in made.model_proto.graph.node)
    assert kinds["Gather"] == 1
    assert kinds["GatherND"] == 1
    assert kinds["Where"] == 0
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    values = (value.numpy() for value in (x, y, index, other))
    (found,) = session.run(None, dict(zip(names, values, strict=True)))
    due = model(x, y, index, other)
    assert error_ratio(torch.from_numpy(found), due) < 1e-6
    assert error_ratio(due.roll(1, dims=1), due) > 0.1
