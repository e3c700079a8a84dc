"""What is rewritten in an exported program before AOTInductor compiles it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true


def onednn_linears(program: ExportedProgram) -> int:
    """Give fp32 linears on a CPU to oneDNN, with the GELU behind them where nothing else reads what stands between; returns
    how many. None where torch was built without it.

    The compiler calls the BLAS library for them, which is slower on AMD's processors, and adds bias and GELU in
    passes of their own. In 16 bits torch's linear is oneDNN's already.
    """
    return _rewritten(program, _linear)


def onednn_depthwise(program: ExportedProgram) -> int:
    """Give fp32 depthwise 3-D convolutions on a CPU to oneDNN with the channels last, as the tokens lie; returns how many.

    For torch's own operator the compiler copies tokens into another layout and back. Where an axis may have one token, as
    the frames of an image, its stride says nothing, oneDNN may answer in another layout than the compiler expects, and the
    batch comes out mixed: such convolutions stay as they are.
    """
    return _rewritten(program, _depthwise)


class _Call(NamedTuple):
    """A call of oneDNN in the place of a node and what follows it up to `last`."""

    operator: OpOverload
    args: tuple[Any, ...]
    last: Node


def _rewritten(program: ExportedProgram, call: Callable[[Node], _Call | None]) -> int:
    if not torch.backends.mkldnn.is_available():
        return 0
    graph = program.graph_module.graph
    count = 0
    for node in list(graph.nodes):
        found = call(node)
        if found is None:
            continue
        with graph.inserting_after(node):
            made = graph.call_function(found.operator, found.args)
        made.meta = dict(found.last.meta)
        found.last.replace_all_uses_with(made)
        for one in dict.fromkeys((found.last, node)):
            graph.erase_node(one)
        count += 1
    graph.lint()
    program.graph_module.recompile()
    return count


def _linear(node: Node) -> _Call | None:
    if not _on_cpu(node, torch.ops.aten.linear.default) or not _stored(node.args[1:]):
        return None
    read, weight, bias = (*node.args, None)[:3]
    last, (post, form) = _with_gelu(node)
    return _Call(torch.ops.mkldnn._linear_pointwise.default, (read, weight, bias, post, [], form), last)


def _depthwise(node: Node) -> _Call | None:
    if not _on_cpu(node, torch.ops.aten.conv3d.default) or node.kwargs:
        return None
    read, weight, bias, stride, padding, dilation, groups = (*node.args, *_CONV3D[len(node.args) :])
    if groups == 1 or not _stored((weight, bias)):
        return None
    if not all(statically_known_true(size >= 2) for size in node.meta["val"].shape[2:]):
        return None
    args = (read, weight, bias, padding, stride, dilation, groups, "none", [], "")
    return _Call(torch.ops.mkldnn._convolution_pointwise.default, args, node)


_CONV3D = (None, None, None, [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)
"""What the arguments of conv3d are where they are left out."""


def _stored(weights: Sequence[object]) -> bool:
    """Are weight and bias the model's own, and not computed from them? The compiler's form of oneDNN takes no others."""
    return all(one is None or (isinstance(one, Node) and one.op == "placeholder") for one in weights)


def _on_cpu(node: Node, target: object) -> bool:
    """Is a node this operator in fp32 on a CPU?"""
    if node.op != "call_function" or node.target is not target:
        return False
    value = node.meta["val"]
    return bool(value.dtype == torch.float32 and value.device.type == "cpu")


def _with_gelu(node: Node) -> tuple[Node, tuple[str, str]]:
    """The last of the nodes that one call does, and oneDNN's name and form of what is done after the matmul."""
    (reader,) = node.users if len(node.users) == 1 else (None,)
    if reader is None or reader.target is not torch.ops.aten.gelu.default:
        return node, ("none", "")
    return reader, ("gelu", reader.kwargs.get("approximate", "none"))
