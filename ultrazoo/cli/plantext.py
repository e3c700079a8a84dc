"""One plan as text: what the recipe stands for, cost and memory per layer and in total, where it fits, how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..cost.units import count, duration, flops, gib, layer_list, params
from .out import style, table

if TYPE_CHECKING:
    from ..analysis.coverage import Coverage
    from ..cost import LayerPlan
    from ..recipe import Plan

_LAYER_COLUMNS = [
    "layers",
    "attention",
    "keys/query",
    "attention",
    "projections",
    "other",
    "new params",
    "peak",
    "start",
]

_PEAK = "peak: most bytes alive at once inside the attention, beside its input; inference, batch 1"
_RANGE = "keys/query: what is assumed of the data (an option `expected`, where a design has one), and what they can make of it"


def text(plan: Plan, *, every_layer: bool = False, coverage: Coverage | None = None) -> str:
    """The plan for people; layers that cost the same share a row unless `every_layer`."""
    parts = [_head(plan), _layers(plan.layers, every_layer), "" if coverage is None else coverage.text()]
    parts += [_steps(plan), _totals(plan), _fits(plan), _seconds(plan)]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    resolved = plan.resolved
    video, grid = resolved.video, plan.grid
    frames = f"{video.frames} frame{'s' * (video.frames != 1)}"
    pixels = f"{video.width}x{video.height}, {frames}, " if video.width else ""
    rows = [
        ["backbone", f"{resolved.backbone.name}, {len(plan.layers)} layers"],
        ["size", f"{pixels}grid {grid}, {count(grid.tokens)} tokens"],
        ["dtype", f"{resolved.dtype}, seed {resolved.seed}"],
    ]
    if resolved.source:
        rows.insert(0, ["source", resolved.source])
    named = resolved.weights
    rows.append(
        [
            "weights",
            f"{named.path} ({named.format})" if named else "none named: every parameter starts as the seed says",
        ]
    )
    if resolved.plugins:
        rows.append(["plugins", ", ".join(str(row["name"]) for row in resolved.plugins)])
    rows.append(["hash", plan.hash])
    title = style(plan.name, "bold") + (f": {resolved.summary}" if resolved.summary else "")
    return title + "\n" + table(rows, indent="  ")


def _layers(layers: Sequence[LayerPlan], every_layer: bool) -> str:
    rows = []
    for group in [[layer] for layer in layers] if every_layer else _grouped(layers):
        one = group[0]
        rows.append(
            [
                layer_list([layer.layer for layer in group]),
                one.attention if one.written == one.attention else f"{one.written} = {one.attention}",
                _keys(one),
                flops(one.attention_flops),
                flops(one.projection_flops),
                flops(one.other_flops),
                params(one.extra_parameters),
                gib(one.peak_bytes),
                one.start,
            ]
        )
        if len(one.branches) > 1:
            # tokens of the grid, from the layer's own figures
            tokens = one.pairs / one.keys_per_query if one.keys_per_query else 1
            for branch in one.branches:
                figures = [flops(branch.attention_flops), flops(branch.projection_flops), flops(branch.other_flops)]
                keys = count(round(branch.pairs / tokens))
                rows.append(["", f"  {branch.name}", keys, *figures, params(branch.parameters)])
    notes = [_PEAK]
    if any("(" in row[2] for row in rows):
        notes.append(_RANGE)
    for group in _grouped(layers):
        one = group[0]
        if one.full_pairs and one.visited > one.full_pairs:
            where = layer_list([layer.layer for layer in group])
            notes.append(
                f"layers {where}: blocks padded to one size make {one.visited / one.full_pairs:.2f} of full attention's pairs; "
                "smaller blocks, or an order that the grid fits, leave less to pad"
            )
    return table(rows, _LAYER_COLUMNS, right="llrrrrrr") + "\n" + style("\n".join(notes), "dim")


def _keys(one: LayerPlan) -> str:
    """Keys per query, and between which numbers the data decide."""
    text = count(round(one.keys_per_query))
    if one.pairs and one.pairs_min is not None and one.pairs_max is not None:
        low, high = (round(pairs / one.pairs * one.keys_per_query) for pairs in (one.pairs_min, one.pairs_max))
        text += f" ({count(low)}-{count(high)})" if low != high else ""
    return text


def _grouped(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers that cost the same, in order of first appearance; parities separate by themselves."""
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for one in layers:
        key = (
            *(one.attention, one.written, one.pairs, one.flops, one.extra_parameters, one.branches, one.peak_bytes),
            one.start,
        )
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _steps(plan: Plan) -> str:
    rows = []
    for one in plan.resolved.steps:
        names: dict[str, list[int]] = {}
        for layer, spec in sorted(one.layers.items()):
            names.setdefault(spec.name, []).append(layer)
        what = "; ".join(f"{name} in layers {layer_list(where)}" for name, where in names.items())
        rows.append([f"{one.first}-{one.last}", what])
    return table(rows, ["at steps", "instead"]) if rows else ""


def _totals(plan: Plan) -> str:
    totals, clip = plan.totals, plan.clip
    memory = totals.activation_bytes
    less = "" if totals.attention_speedup is None else f", full attention takes {totals.attention_speedup:.2f}×"
    split = f"projections {flops(totals.projection_flops)}, other {flops(totals.other_flops)}"
    training = f"training {gib(memory.train)}, with checkpointing {gib(memory.train_checkpointed)}"
    rows = [
        ["attention", flops(totals.attention_flops) + less],
        ["forward", f"{flops(totals.flops)} ({split})"],
        ["clip", f"{clip.forwards} forwards, {flops(clip.flops)}"],
        ["parameters", f"{count(totals.parameters)}, of them {count(totals.extra_parameters)} beside the backbone's"],
        ["weights", gib(totals.weight_bytes)],
        ["activations", f"inference {gib(memory.infer)}, {training}"],
        *(
            [f"+ {one.role}", f"{one.name}, a clip {flops(one.flops)}; in no other figure"]
            for one in plan.priced.companions
        ),
    ]
    return style("One forward at batch 1, and a clip", "bold") + "\n" + table(rows, indent="  ")


def _fits(plan: Plan) -> str:
    rows = []
    for fit in plan.fits:
        answers = ["yes" if holds else "no" for holds in (fit.infer, fit.train, fit.train_checkpointed)]
        rows.append([fit.gpu, f"{fit.gib:g} GiB", *answers])
    return table(rows, ["fits", "memory", "inference", "training", "training, checkpointed"])


def _seconds(plan: Plan) -> str:
    rows = []
    for row in plan.seconds:
        clip = "-" if row.clip is None else duration(row.clip)
        rows.append([row.gpu, duration(row.forward), clip, row.assumed])
    return table(rows, ["predicted on", "forward", "clip", "assumed efficiencies"])
