"""What is rewritten in an exported program before AOTInductor compiles it."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram


def loose_biases(program: ExportedProgram) -> int:
    """Take the bias of fp32 linears on a CPU out of the matmul; returns how many.

    The library's matmul with a bias first fills the whole output with it, one pass more over the tokens. As an addition of its
    own it is fused into whatever reads the output. In 16 bits the output would be rounded twice.
    """
    graph = program.graph_module.graph
    aten = torch.ops.aten
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.linear.default or len(node.args) < 3:
            continue
        value, bias = node.meta["val"], node.args[2]
        if bias is None or value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        with graph.inserting_after(node):
            added = graph.call_function(aten.add.Tensor, (node, bias))
        added.meta = dict(node.meta)
        node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
        node.args = node.args[:2]
        count += 1
    graph.lint()
    program.graph_module.recompile()
    return count
