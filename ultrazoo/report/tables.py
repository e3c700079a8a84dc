"""Rows of the report's tables: layers put together, seconds, fits. Plain text in, no markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cost import LayerPlan, units
from ..spec import BranchCost


@dataclass(frozen=True)
class LayerRow:
    """Layers of equal cost, or one branch of them."""

    cells: tuple[str, ...]
    branch: bool = False


LAYER_HEADINGS = (
    "layers",
    "attention",
    "keys per query",
    "attention FLOPs",
    "projections",
    "other",
    "extra parameters",
    "peak memory",
)


def layer_groups(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers that are alike in everything but their number, in order of first appearance."""
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in layers:
        key = (
            layer.attention, layer.written, layer.pairs, layer.attention_flops, layer.projection_flops,
            layer.other_flops, layer.extra_parameters, layer.peak_bytes, layer.start, layer.branches,
        )  # fmt: skip
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def layer_rows(layers: Sequence[LayerPlan], tokens: int) -> list[LayerRow]:
    """One row per group of layers, its branches under it; figures are those of one layer."""
    rows = []
    for group in layer_groups(layers):
        one = group[0]
        numbers = units.layer_list([layer.layer for layer in group])
        figures = _figures(one, one.extra_parameters, tokens)
        rows.append(LayerRow((numbers, label(one), *figures, units.gib(one.peak_bytes))))
        if len(one.branches) > 1:
            rows += [LayerRow((b.name, "", *_figures(b, b.parameters, tokens), ""), branch=True) for b in one.branches]
    return rows


def _figures(one: LayerPlan | BranchCost, parameters: int, tokens: int) -> tuple[str, ...]:
    return (
        keys(one.pairs, tokens),
        units.flops(one.attention_flops),
        units.flops(one.projection_flops),
        units.flops(one.other_flops),
        units.count(parameters),
    )


def label(layer: LayerPlan) -> str:
    """The name a recipe gives and, where it is a composition, what it stands for."""
    return layer.attention if layer.written == layer.attention else f"{layer.written} = {layer.attention}"


def keys(pairs: int, tokens: int) -> str:
    """Keys per query, whole where it is large."""
    value = pairs / tokens
    return units.count(round(value)) if value >= 100 else f"{value:.3g}"


def starts(layers: Sequence[LayerPlan]) -> list[tuple[str, str, str]]:
    """(layers, attention, how it starts) for each design of a plan."""
    found: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        found.setdefault((label(layer), layer.start), []).append(layer.layer)
    return [(units.layer_list(numbers), name, start) for (name, start), numbers in found.items()]
