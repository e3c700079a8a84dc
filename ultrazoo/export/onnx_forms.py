"""Operators of torch as fewer operators of ONNX than torch's own translation makes.

Torch's translations hold for every input. Ours take what they know of these models: one index along one axis is a Gather
(not a GatherND between two transpositions), a product that is multiplied by one need not be, and `lerp` in its plain form
(torch's two forms differ in the last bit at the far end) saves four passes over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as its ``custom_translation_table``."""
    import onnx_ir
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.core import aten_index

    def index(self: Any, indices: Sequence[Any]) -> Any:
        (axis, one), *more = [(axis, one) for axis, one in enumerate(indices) if one is not None]
        if more or one.dtype == onnx_ir.DataType.BOOL:
            return aten_index(self, indices)
        return op.Gather(self, one, axis=axis)

    def addcmul(self: Any, tensor1: Any, tensor2: Any, value: float = 1.0) -> Any:
        product = op.Mul(tensor1, tensor2)
        if value != 1.0:
            product = op.Mul(product, op.CastLike(op.Constant(value_float=float(value)), product))
        return op.Add(self, product)

    def lerp(self: Any, end: Any, weight: Any) -> Any:
        return op.Add(self, op.Mul(op.Sub(end, self), op.CastLike(weight, self)))

    aten = torch.ops.aten
    return {aten.index.Tensor: index, aten.addcmul.default: addcmul, aten.lerp.Tensor: lerp}
