"""From a model to torch's exported program with open sizes, less what does nothing.

Layers share most of what follows from sizes while they are traced (`ops.graphs.of_sizes`); `share_sizes` finds the rest, and
`drop_idle` takes out checks of dtypes and casts to the dtype that is there. A small UltraGen loses one node in five.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..attention.contract import export_form
from ..ports import Port
from .sizes import Bounds, Sizes, inputs_at


def program_of(
    model: nn.Module, target: str, ports: Sequence[Port], bounds: Bounds, sizes: Sizes, dtype: torch.dtype
) -> ExportedProgram:
    """The exported program of a model, traced at `sizes`, valid within `bounds`."""
    dims = {axis: Dim(axis, min=bound.low, max=bound.high) for axis, bound in bounds.items() if bound.open}
    shapes = {
        port.name: {
            dim: one[1] * dims[one[0]]
            for dim, one in enumerate(port.shape)
            if not isinstance(one, int) and one[0] in dims
        }
        for port in ports
    }
    inputs = inputs_at(ports, sizes, dtype)
    device = next(model.parameters()).device
    placed = tuple(inputs[port.name].to(device) for port in ports)
    with torch.no_grad(), export_form(model, target):
        found = torch.export.export(model, placed, dynamic_shapes=shapes)
    drop_idle(found)
    share_sizes(found)
    return found


def drop_idle(program: ExportedProgram) -> int:
    """Take out nodes that change nothing: assertions of dtypes, casts to the dtype that is there, plain aliases; returns how
    many."""
    aten = torch.ops.aten
    graph = program.graph_module.graph
    gone = 0
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        idle = node.target is aten._assert_tensor_metadata.default or (
            node.target is aten.promote_types.default and not node.users
        )
        if node.target is aten.alias.default or (node.target is aten.to.dtype and _same_dtype(node)):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            idle = True
        if idle:
            graph.erase_node(node)
            gone += 1
    graph.lint()
    program.graph_module.recompile()
    return gone


def _same_dtype(node: Node) -> bool:
    """Is a cast one to the dtype of what it reads, without asking for a copy or a layout?"""
    read, *rest = node.args
    assert isinstance(read, Node)
    return len(rest) == 1 and not node.kwargs and bool(read.meta["val"].dtype == node.meta["val"].dtype)


def share_sizes(program: ExportedProgram) -> int:
    """Compute once what follows from sizes alone; returns how many nodes went."""
    graph = program.graph_module.graph
    first: dict[Any, Node] = {}
    from_sizes: set[Node] = set()
    gone = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _follows(node, from_sizes):
            continue
        key = _key(node)
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
            gone += 1
        else:
            first[key] = node
            from_sizes.add(node)
    graph.lint()
    program.graph_module.recompile()
    return gone


def _follows(node: Node, from_sizes: set[Node]) -> bool:
    """Does a node give the same whenever the sizes are the same, and nothing but that?"""
    target = node.target
    if target is torch.ops.aten.sym_size.int:
        return True
    if not all(one in from_sizes for one in node.all_input_nodes):
        return False
    if isinstance(target, torch._ops.OpOverload):
        impure = target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
        # a node without a value is there for its effect: a check of sizes
        return not impure and node.meta.get("val") is not None
    return node.meta.get("val") is not None


def _key(node: Node) -> Any:
    """Equal for nodes of equal value."""
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return ("size", str(value.node.expr))
    if isinstance(value, int | float | bool):
        return ("number", type(value), value)

    def plain(x: Any) -> Any:
        return ("node", x.name) if isinstance(x, Node) else (type(x).__name__, str(x))

    return (str(node.target), str(pytree.tree_map(plain, node.args)), str(pytree.tree_map(plain, node.kwargs)))
