"""README.md of a built model: a model card with YAML front matter, as model hubs read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..cost import units
from . import tables
from .page import backbone_text, grid_text, size_text

if TYPE_CHECKING:
    from ..recipe import Plan

_FILES = (
    "`recipe.yaml` the resolved recipe (`ultrazoo build recipe.yaml` makes {again}), `plan.json` cost per layer and in total, "
    "`config.json` what `from_pretrained` reads, `model.safetensors` (or shards with an index) every "
    "parameter"
)
_REPORT = ", `report.html` pictures and tables"
_GPUS = ("RTX 4090", "H20 96GB", "H100 80GB", "B200")


def card(plan: Plan, *, origin: Mapping[str, Any] | None = None, report: bool = True, parts: str = "all") -> str:
    """The card as Markdown. It names no licence: the weights' owner adds one.

    `origin` says where the numbers of a model that exists come from (config.json has the same); None: it is built from its
    recipe now. `report` tells of a report.html beside it; `parts` is ``new`` for a design's parameters
    alone.
    """
    resolved, totals = plan.resolved, plan.totals
    size = size_text(plan)
    files = _FILES.format(again="this model again" if origin is None else "one of the same design, from its start")
    lines = [
        "---",
        _front(plan),
        "---",
        "",
        f"# {_line(plan.name)}",
        "",
        *([_line(resolved.summary), ""] if resolved.summary else []),
        *([f"Source: {_line(resolved.source)}", ""] if resolved.source else []),
        "| | |",
        "|---|---|",
        f"| Backbone | {_line(backbone_text(plan))} |",
        f"| Size | {f'{_line(size)}, ' if size else ''}grid {grid_text(plan)}, {units.count(plan.grid.tokens)} tokens |",
        f"| Parameters | {units.count(totals.parameters)}, of them new {units.count(totals.extra_parameters)} |",
        f"| Weights | {units.gib(totals.weight_bytes)} in {resolved.dtype} |",
        f"| One forward | {units.flops(totals.flops)}, of it attention {units.flops(totals.attention_flops)} |",
        f"| Attention against full | {units.ratio(totals.attention_speedup)} fewer FLOPs |",
        f"| A clip | {plan.clip.forwards} forwards, {units.flops(plan.clip.flops)} |",
        "",
        "## Attention",
        "",
        "| layers | attention | start on pretrained weights |",
        "|---|---|---|",
        *(f"| {numbers} | {_line(name)} | {_line(start)} |" for numbers, name, start in tables.starts(plan.layers)),
        "",
        _weights(plan) if origin is None else _origin(origin),
        "",
        "## Use",
        "",
        "```python",
        "import ultrazoo",
        "",
        *_use(parts),
        "```",
        "",
        *_seconds(plan),
        "## Files",
        "",
        f"{files}{'' if parts == 'all' else ' of the design alone'}{_REPORT if report else ''}.",
        "",
        f"Recipe hash `{plan.hash}`, seed {resolved.seed}, ultrazoo {__version__}.",
        "",
    ]
    return "\n".join(lines)


def _use(parts: str) -> list[str]:
    here = "path/to/this/directory"
    if parts == "all":
        return [f'model = ultrazoo.from_pretrained("{here}")']
    return [
        "# the pipeline or model whose attention this is, opened by its own library",
        f'ultrazoo.apply(pipeline, "{here}/recipe.yaml", "weights.path={here}")',
    ]


def _front(plan: Plan) -> str:
    import yaml

    data: dict[str, Any] = {
        "library_name": "ultrazoo",
        "tags": ["ultrazoo", "diffusion-transformer", "efficient-attention", plan.resolved.backbone.name],
        "ultrazoo": {
            "recipe": plan.name,
            "hash": plan.hash,
            "version": __version__,
            "backbone": backbone_text(plan),
            "grid": list(plan.grid),
            "parameters": plan.totals.parameters,
        },
    }
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).strip()


def _weights(plan: Plan) -> str:
    seed = plan.resolved.seed
    if plan.resolved.weights is None:
        return (
            f"**The weights are untrained**: every parameter was drawn from seed {seed}. The model makes noise until it is "
            "trained or pretrained weights are loaded into it."
        )
    return (
        f"Weights were loaded from a checkpoint; parameters that it does not hold were drawn from seed {seed}. A design "
        "that needs tuning makes poor results until it is tuned."
    )


def _origin(origin: Mapping[str, Any]) -> str:
    weights = origin.get("weights")
    parts = []
    if isinstance(weights, Mapping):
        file = str(weights.get("path", "")).replace("\\", "/").rpartition("/")[2]
        parts.append(f"Weights came from {_line(file)} (format {_line(str(weights.get('format')))}).")
        if weights.get("new"):
            parts.append("What it does not hold was new.")
    elif origin.get("applied"):
        parts.append(f"The design's new parameters were drawn from seed {origin.get('seed')}.")
    else:
        parts.append(f"Parameters were drawn from seed {origin.get('seed')}.")
    if origin.get("applied"):
        parts.append(
            f"The design was applied to a loaded {_line(str(origin['applied']))}, whose own weights came with it."
        )
    if origin.get("merged"):
        parts.append(f"LoRAs of the design with recipe hash `{_line(str(origin['merged']))}` were merged.")
    parts.append("Whether they were trained since is not recorded here.")
    return " ".join(parts)


def _seconds(plan: Plan) -> list[str]:
    rows = [one for one in plan.seconds if one.gpu in _GPUS]
    if not rows:
        return []
    return [
        "## Predicted time",
        "",
        "One GPU, batch 1, the transformer alone; a prediction from FLOPs and bytes, not a measurement.",
        "",
        "| GPU | forward | clip | assumed |",
        "|---|---|---|---|",
        *(
            f"| {one.gpu} | {units.duration(one.forward)} | "
            f"{'–' if one.clip is None else units.duration(one.clip)} | {one.assumed} |"
            for one in rows
        ),
        "",
    ]


def _line(text: str) -> str:
    """Text of a recipe as one line of Markdown: no markup of its own takes effect."""
    plain = " ".join(str(text).split())
    for mark in "\\`*_<>[]#|":
        plain = plain.replace(mark, f"\\{mark}")
    return plain
