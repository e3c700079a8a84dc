"""What is rewritten on the way to a file gives the same, in fewer passes over the tokens."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ultrazoo.export.aoti_forms import onednn_depthwise, onednn_linears
from ultrazoo.testing import error_ratio


class _Linears(nn.Module):
    """A linear with a GELU behind it, one whose GELU is not all that reads it, one without bias, and one whose weight is
    computed, which the compiler could not give to oneDNN."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4, bias=False)
        self.kernel = nn.Parameter(torch.randn(4, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(nn.functional.gelu(self.first(x), approximate="tanh"))
        z = self.last(nn.functional.gelu(y) + y)
        return nn.functional.linear(z, self.kernel.transpose(1, 2).flatten(1))


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 3), (torch.bfloat16, 0)])
def test_linears_of_full_precision_are_onednn_s(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    model = _Linears().to(dtype)
    x = torch.randn(3, 5, 6, dtype=dtype)
    program = torch.export.export(model, (x,))
    assert onednn_linears(program) == count
    targets = Counter(node.target for node in program.graph.nodes)
    assert targets[torch.ops.mkldnn._linear_pointwise.default] == count
    assert targets[torch.ops.aten.linear.default] == 4 - count
    assert targets[torch.ops.aten.gelu.default] == (1 if count else 2)
    found, due = program.module()(x), model(x)
    assert error_ratio(found, due) < 1e-6
    assert error_ratio(nn.functional.gelu(due), due) > 1e-2


class _Convolutions(nn.Module):
    """A depthwise convolution of tokens, and one that is not depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.dense = nn.Conv3d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.permute(0, 4, 1, 2, 3))
        return (self.dense(y) + y).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 0)])
def test_depthwise_convolutions_of_full_precision_are_onednn_s(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    model = _Convolutions().to(dtype)
    dims = {"x": {axis: torch.export.Dim(f"n{axis}", min=2) for axis in (1, 2, 3)}}
    program = torch.export.export(model, (torch.randn(2, 3, 4, 5, 8, dtype=dtype),), dynamic_shapes=dims)
    assert onednn_depthwise(program) == count
    targets = Counter(node.target for node in program.graph.nodes)
    assert targets[torch.ops.mkldnn._convolution_pointwise.default] == count
    assert targets[torch.ops.aten.conv3d.default] == 2 - count
    x = torch.randn(2, 4, 3, 7, 8, dtype=dtype)
    found, due = program.module()(x), model(x)
    assert error_ratio(found, due) < 1e-6
    assert error_ratio(due.roll(1, dims=1), due) > 0.1


@pytest.mark.parametrize("axis", [1, 3])
def test_a_convolution_with_an_axis_of_one_token_stays(axis: int) -> None:
    sizes = {1: 3, 2: 4, 3: 5} | {axis: 1}
    dims = {"x": {other: torch.export.Dim(f"n{other}", min=2) for other in sizes if other != axis}}
    x = torch.randn(2, *sizes.values(), 8)
    program = torch.export.export(_Convolutions(), (x,), dynamic_shapes=dims)
    assert onednn_depthwise(program) == 0


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
