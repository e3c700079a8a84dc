"""What is settled of an exported file before it samples: the pipeline it stands in, size, text, steps, dtype, device, memory."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from ..backbones.recognised import NATIVE
from ..errors import UsageError, listed
from ..export.sizes import Axis
from ..grid import Grid
from ..weights.disk import human
from . import before
from .engine import EngineModel, require_same_recipe
from .families import Family, Request
from .memory import free_bytes
from .pipelines import class_of
from .wanted import Wanted


def engine_model(
    source: Any, directory: str | Path, family: Family, wanted: Wanted, overrides: tuple[str, ...]
) -> EngineModel:
    """The exported files that `wanted` names, as a model that fits the pipeline in `directory`; nothing is loaded yet.

    Raises UsageError where it does not fit, where `source` is another recipe than theirs, and for another dtype or device.
    """
    if family.model not in {model for _, model in NATIVE.values()}:
        raise UsageError(
            f"no exported file stands in for {family.model}: export takes native backbones, of which pipelines call "
            f"{listed(NATIVE)}; leave --engine out and give a recipe"
        )
    label = listed(map(str, wanted.engines))
    before.require_one_transformer(label, directory)
    model = EngineModel(wanted.engines)
    content = model.engines[0].content
    require_same_recipe(source, overrides, model)
    before.require_kind(label, model.plan, family)
    before.require_fit(label, model, directory, family)
    if wanted.dtype not in (None, content["dtype"]):
        raise UsageError(
            f"--dtype {wanted.dtype}: {label} counts in {content['dtype']}, which is fixed; leave --dtype out, or export "
            f"again with --dtype {wanted.dtype}"
        )
    device = model.engines[0].device
    if device.type != "cpu" and torch.device(wanted.device).type == "cpu":
        raise UsageError(f"{label} was exported for {device}; add --device {device}, or export again with --device cpu")
    return model


def require_run(model: EngineModel, request: Request, grid: Grid, samples: int, name: str) -> None:
    """Raise UsageError where the files are not for the size, the text or the steps of a run of the pipeline class `name`,
    SiteError where the design cannot run at the size."""
    sizes = {"b": samples, "t": grid.t, "h": grid.h, "w": grid.w}
    # pipelines pad every prompt to the same length
    row = inspect.signature(class_of(name).__call__).parameters.get("max_sequence_length")
    if row is not None and isinstance(row.default, int):
        sizes["text"] = row.default
    model.require_steps(request.steps)
    for engine in model.engines:
        wrong = {
            axis: size
            for axis, size in sizes.items()
            if not engine.bounds[axis].low <= size <= engine.bounds[axis].high
        }
        if wrong:
            told = "; ".join(_told(model, engine.bounds[axis], size) for axis, size in wrong.items())
            cure = _cure(engine.content["kind"], [engine.bounds[axis] for axis in wrong], grid)
            raise UsageError(f"{engine.file} was not exported for {told}; {cure}")
    model.session.require(grid)


def _told(model: EngineModel, bound: Axis, size: int) -> str:
    """A size and its bounds as a user gives them: pixels and frames."""
    geometry = model.plan.resolved.backbone.geometry  # type: ignore[attr-defined]

    def shown(value: int) -> str:
        width, height, frames = geometry.pixels(Grid(*(value if bound.name == axis else 1 for axis in ("t", "h", "w"))))
        return str({"b": value, "text": value, "t": frames, "h": height, "w": width}[bound.name])

    what = {
        "b": f"a batch of {size}",
        "text": f"{size} text tokens",
        "t": f"{shown(size)} frames",
        "h": f"height {shown(size)}",
        "w": f"width {shown(size)}",
    }[bound.name]
    return f"{what} (allowed {shown(bound.low)}" + (f" to {shown(bound.high)})" if bound.open else ")")


def _cure(kind: str, bounds: list[Axis], grid: Grid) -> str:
    if kind != ("image" if grid.t == 1 else "video"):
        return f"it makes {kind}s: an image and a video are two exports"
    closed = [one.name for one in bounds if not one.open]
    if not closed:
        return "its design allows no other size"
    return f"export again with --dynamic {','.join(closed)} among others, or with a recipe of this size"


def notes(model: EngineModel, device: torch.device, need: int) -> list[str]:
    """What is said of the files before they run on their own device in a pipeline on `device`; `need` bytes there.

    Raises UsageError where they compute on the CPU beside a pipeline on a GPU and the machine's memory is too small.
    """
    first = model.engines[0]
    found = [f"transformer: {model.label} ({first.content['target']}, {first.content['dtype']})"]
    if first.device.type == device.type:
        return found
    free = free_bytes(first.device)
    if free is not None and need > free:
        raise UsageError(
            f"{model.label} computes on the {first.device} and needs about {human(need)} there, {human(free)} are free"
        )
    why = "as onnxruntime does" if first.content["target"] == "onnx" else "for which it was exported"
    found.append(
        f"the file computes on the {first.device}, {why}, everything else on {device}; it needs about {human(need)} there"
    )
    return found
