"""Functions outside graphs: never compiled, and written down without the compiler being imported."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from ultrazoo.ops.graphs import constant_in_graphs, longer, made_once, of_sizes, outside_graphs


class Twice(nn.Module):
    """A step that depends on values between two that do not; `seen` counts Python's calls of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self._count(x + 1) * 2

    @outside_graphs
    def _count(self, x: Tensor) -> Tensor:
        self.seen += 1
        assert not torch.compiler.is_compiling()
        return x * int((x > 0).sum())


def test_a_compiler_goes_around() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    module = Twice()
    compiled = torch.compile(module, backend=keep)
    for size in (3, 5, 7):
        x = torch.arange(size) - 1.5
        assert torch.equal(compiled(x), (x + 1) * int((x + 1 > 0).sum()) * 2)
    assert module.seen == 3
    assert graphs
    assert not any("sum" in str(node.target) or "gt" in str(node.target) for one in graphs for node in one.graph.nodes)


def test_constants_are_marked_as_torch_marks_them() -> None:
    def ours() -> int:
        return 3

    def theirs() -> int:
        return 3

    assert vars(constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs))
    assert vars(ours)


def test_no_attention_imports_the_compiler() -> None:
    """It takes longer to import than torch does, and a plan compiles nothing."""
    code = (
        "import sys; from ultrazoo import registry; "
        "[registry.find('attention', row.name) for row in registry.entries('attention') if row.builtin]; "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_longer_of_two_sizes_is_followed_by_a_tracer():
    def doubled(x: Tensor) -> Tensor:
        return x.new_zeros(1) + longer(x.shape[0] * 2, x.shape[1])

    traced = torch.jit.trace(doubled, (torch.zeros(2, 3),))
    for shape in ((2, 3), (5, 4), (1, 7)):
        assert traced(torch.zeros(shape)).item() == max(2 * shape[0], shape[1])
    assert longer(3, 4) == 4


@of_sizes
def thirds(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    at = torch.arange(length, device=device)
    return at // 3, at % 3


@of_sizes
def doubled(x: Tensor) -> Tensor:
    return x * 2


class Layers(nn.Module):
    """The same arithmetic of sizes for each of three layers; the last asks for another axis, of another size."""

    def forward(self, x: Tensor) -> Tensor:
        with made_once():
            for axis in (1, 1, 2):
                whole, rest = thirds(x.shape[axis], x.device)
                added = doubled(whole) + doubled(rest)
                x = x + added.view(1, -1, 1) if axis == 1 else x + added
            return x


def test_layers_of_a_graph_share_what_follows_from_sizes() -> None:
    x = torch.randn(2, 6, 5)
    dims = {"x": {1: torch.export.Dim("n", min=2), 2: torch.export.Dim("m", min=2)}}
    found = torch.export.export(Layers(), (x,), dynamic_shapes=dims)
    names = [str(node.target) for node in found.graph.nodes]
    # one for each axis, not one for each layer
    assert names.count("aten.arange.default") == 2
    assert names.count("aten.mul.Tensor") == 4
    for n, m in ((2, 9), (7, 3), (6, 6)):
        other = torch.randn(2, n, m)
        assert torch.equal(found.module()(other), Layers()(other))


def test_axes_of_one_length_at_tracing_stay_two() -> None:
    dims = {"x": {1: torch.export.Dim("n", min=2), 2: torch.export.Dim("m", min=2)}}
    found = torch.export.export(Layers(), (torch.randn(2, 4, 4),), dynamic_shapes=dims)
    other = torch.randn(2, 5, 8)
    assert torch.equal(found.module()(other), Layers()(other))


def test_nothing_is_kept_outside_of_graphs() -> None:
    with made_once():
        one, again = (thirds(6, torch.device("cpu"))[0] for _ in range(2))
    assert one is not again
    assert torch.equal(one, again)
