"""What an exported program holds inside: operators, the largest tensor, and tensors that grow with tokens squared.

Read from the sizes that the exporter derived for every node, as functions of the open axes; nothing is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from ..ports import Port
from .sizes import Bounds, Sizes

SQUARE = 1.7
"""Growth, over that of the tokens, from which a tensor is said to grow faster than the tokens."""


@dataclass(frozen=True)
class Inside:
    """One tensor of a graph: the operator that makes it, its shape in the axes' names, its bytes at the recipe's size."""

    operator: str
    shape: str
    bytes: int

    def data(self) -> dict[str, Any]:
        return {"operator": self.operator, "shape": self.shape, "bytes": self.bytes}


@dataclass(frozen=True)
class Interior:
    """Operators by number, the largest tensor at `sizes`, the largest that grows faster than the tokens (None: no tensor
    does), and the largest scores that a kernel without flash attention would hold; `scores_at` gives the bytes of the
    largest of both at any size, where they are known as a function of it."""

    operators: dict[str, int]
    largest: Inside
    square: Inside | None
    scores: Inside | None
    scores_at: Callable[[Sizes], int] | None = None

    def data(self) -> dict[str, Any]:
        return {
            "operators": self.operators,
            "largest": self.largest.data(),
            "faster_than_tokens": None if self.square is None else self.square.data(),
            "scores_without_flash": None if self.scores is None else self.scores.data(),
        }


def interior(program: ExportedProgram, ports: Sequence[Port], bounds: Bounds, sizes: Sizes) -> Interior:
    """Look through a program; bytes are those at `sizes`, axes that are not open at their own size."""
    symbols = _symbols(program, ports)
    here = {symbol: sizes[axis] for symbol, axis in symbols.items()}
    # twice every side of the smallest grid that is not too small to tell growth
    small = {symbol: bounds[axis].low * (4 if axis in "hw" else 1) for symbol, axis in symbols.items()}
    large = {symbol: size * 2 if symbols[symbol] in "thw" else size for symbol, size in small.items()}
    growth = 2 ** sum(1 for axis in symbols.values() if axis in "thw")
    operators: Counter[str] = Counter()
    known: dict[str, tuple[int, float]] = {}
    largest = square = scores = None
    held: dict[str, tuple[Any, int]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            operators[name.removeprefix("aten.")] += 1
        for value in _tensors(node.meta.get("val")):
            one, grown = _measured(value.shape, value.element_size(), symbols, here, small, large, known)
            if largest is None or one.bytes > largest.bytes:
                largest = Inside(name, one.shape, one.bytes)
            if grown > growth * SQUARE:
                held[one.shape] = _elements(value.shape), value.element_size()
                if square is None or one.bytes > square.bytes:
                    square = Inside(name, one.shape, one.bytes)
        if "scaled_dot_product_attention" in name:
            q, k = (node.args[i].meta["val"] for i in (0, 1))
            one, _ = _measured((*q.shape[:3], k.shape[2]), q.element_size(), symbols, here, small, large, known)
            held[one.shape] = _elements((*q.shape[:3], k.shape[2])), q.element_size()
            if scores is None or one.bytes > scores.bytes:
                scores = Inside(name, one.shape, one.bytes)
    assert largest is not None

    def scores_at(at: Sizes) -> int:
        values = {symbol: at[axis] for symbol, axis in symbols.items()}
        return max(int(count.subs(values)) * size for count, size in held.values())

    return Interior(dict(operators.most_common()), largest, square, scores, scores_at if held else None)


def _elements(shape: Sequence[Any]) -> Any:
    """The number of elements as an expression of the exporter's symbols."""
    count: Any = sympy.Integer(1)
    for size in shape:
        count = count * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return count


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]


def _symbols(program: ExportedProgram, ports: Sequence[Port]) -> dict[Any, str]:
    """The exporter's symbols by the axis that they stand for."""
    names = program.graph_signature.user_inputs
    by_name = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[Any, str] = {}
    for port, name in zip(ports, names, strict=True):
        for size, one in zip(by_name[str(name)].meta["val"].shape, port.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(one, tuple):
                for symbol in size.node.expr.free_symbols:
                    found[symbol] = one[0]
    return found


def _measured(
    shape: Sequence[Any],
    itemsize: int,
    symbols: dict[Any, str],
    here: dict[Any, int],
    small: dict[Any, int],
    large: dict[Any, int],
    known: dict[str, tuple[int, float]],
) -> tuple[Inside, float]:
    """Bytes at one size, and how many times more elements there are at `large` than at `small`."""
    count = _elements(shape)
    texts = []
    for size in shape:
        text = str(size.node.expr if isinstance(size, torch.SymInt) else size)
        for symbol, axis in symbols.items():
            text = text.replace(str(symbol), axis)
        texts.append(text)
    key = str(count)
    if key not in known:
        if not count.free_symbols:
            known[key] = (int(count), 1.0)
        else:
            at = [int(count.subs(values)) for values in (here, small, large)]
            known[key] = (at[0], at[2] / max(1, at[1]))
    elements, growth = known[key]
    return Inside("", f"({', '.join(texts)})", elements * itemsize), growth
