"""What is settled before an export starts: the plan, the target, the design's traits, kernels, sizes, room on the disk."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from .. import assemble, registry
from ..errors import OutputError, UsageError, listed
from ..grid import Grid
from ..ports import Port
from ..recipe import Plan
from ..spec import AttentionSpec, Options, Spec
from ..weights import config
from ..weights.disk import check_space
from ..weights.staging import refuse_existing
from .phases import phase_wanted
from .sizes import Axis, bounds_of, proof_sizes
from .targets import target


@dataclass(frozen=True)
class Wanted:
    """What to export to and how; see `export`."""

    to: str
    out: Path
    dynamic: Collection[str] | None = None
    opset: int | None = None
    phase: str | None = None
    verify: bool = True
    force: bool = False


def opened(source: Any, overrides: tuple[str, ...], dtype: str | None) -> tuple[nn.Module | None, Plan]:
    """The model where it is one already, and the plan of what will be exported."""
    if isinstance(source, nn.Module):
        plan = getattr(source, "plan", None)
        if plan is None:
            raise UsageError("this model has no plan: export takes models made by build or from_pretrained")
        if overrides or (dtype is not None and dtype != plan.resolved.dtype):
            raise UsageError("a model that is there already is exported as it is: leave overrides and dtype out")
        return source, plan
    if _is_directory(source):
        if overrides:
            raise UsageError(f"{source} is built: key=value changes nothing in it any more, got {overrides[0]!r}")
        content = config.read(Path(source))
        config.require_plugins(Path(source), content["plugins"])
        return None, assemble.plan_of(content["recipe"], dtype=dtype)
    return None, assemble.plan_of(source, *overrides, dtype=dtype)


def _is_directory(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and Path(source).is_dir()


def made(source: Any, plan: Plan, device: str | None) -> nn.Module:
    if _is_directory(source):
        return assemble.from_pretrained(source, device=device, dtype=plan.resolved.dtype)
    return assemble.build(plan, device=device)


def checked(plan: Plan, wanted: Wanted) -> tuple[tuple[Port, ...], dict[str, Axis], tuple[int, int] | None]:
    """The model's inputs, its bounds and the phase; raises UsageError or OutputError for whatever can be told from the
    plan alone."""
    module = target(wanted.to)
    if wanted.opset is not None:
        if wanted.to != "onnx":
            raise UsageError(f"--opset belongs to --to onnx, the target is {wanted.to}")
        module.require_opset(wanted.opset)
    if why := module.absent():
        raise UsageError(f"--to {wanted.to}: {why}")
    if plan.resolved.dtype == "bfloat16" and wanted.to == "onnx" and wanted.verify:
        raise UsageError(
            "--to onnx --dtype bfloat16: onnxruntime has no bfloat16 kernels on a CPU, so nothing can be proved here; use "
            "float16 or float32, or --no-verify to write the file for a runtime that has them"
        )
    resolved = plan.resolved
    ports = resolved.backbone.ports(image=resolved.grid.t == 1)
    if not ports:
        raise UsageError(
            f"backbone {resolved.backbone.name!r} is another library's model, of which only the attention is ours; export "
            "takes the native backbones"
        )
    steps = phase_wanted(plan, wanted.phase)
    running = _running(plan, steps)
    _require_traits(wanted.to, running)
    _require_kernels(wanted.to, running)
    lowest = [max(spec.traits().min_grid[axis] for spec in running) for axis in range(3)]
    text = getattr(resolved.backbone, "text_tokens", 1)
    bounds = bounds_of(ports, resolved.grid, (lowest[0], lowest[1], lowest[2]), text, wanted.dynamic)
    refuse_existing(Path(os.path.realpath(wanted.out)), wanted.force)
    _require_room(plan, wanted)
    return ports, bounds, steps


def _running(plan: Plan, steps: tuple[int, int] | None) -> list[AttentionSpec]:
    """Every layer's attention in the phase."""
    found = list(plan.resolved.attention)
    for one in plan.resolved.steps:
        if steps is not None and one.first <= steps[0] <= one.last:
            for layer, spec in one.layers.items():
                found[layer] = spec
    return found


def _require_traits(to: str, running: list[AttentionSpec]) -> None:
    lines: dict[str, list[int]] = {}
    for layer, spec in enumerate(running):
        traits = spec.traits()
        if to not in traits.export:
            why = f" ({traits.notes})" if traits.notes else ""
            others = f"; it exports to {listed(traits.export)}" if traits.export else ""
            lines.setdefault(f"attention {spec.name!r} does not export to {to}{why}{others}", []).append(layer)
    if lines:
        raise UsageError("\n".join(f"{line}: layers {listed(map(str, layers))}" for line, layers in lines.items()))


def _require_kernels(to: str, running: list[AttentionSpec]) -> None:
    """Raise UsageError for kernels that were asked for by name and that no file can hold, wherever in a design they stand."""
    lines: dict[str, list[int]] = {}
    for layer, spec in enumerate(running):
        for owner, name in kernels_in(spec):
            kernel = registry.find("kernel", name)
            if kernel.exportable:
                continue
            kind = "exact" if kernel.exact else "lossy"
            line = (
                f"attention {owner!r} is told to use the {kind} kernel {name!r}, which no {to} file can hold; use kernel: "
                "auto, sdpa or math"
            )
            lines.setdefault(line, []).append(layer)
    if lines:
        raise UsageError("\n".join(f"{line}: layers {listed(map(str, layers))}" for line, layers in lines.items()))


def kernels_in(part: Any) -> list[tuple[str, str]]:
    """(attention, kernel) of every kernel that is asked for by name in a spec or in one inside it."""
    if isinstance(part, Mapping):
        return [one for value in part.values() for one in kernels_in(value)]
    if isinstance(part, tuple | list):
        return [one for value in part for one in kernels_in(value)]
    if not isinstance(part, Options | Spec):
        return []
    found = []
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name == "kernel" and isinstance(value, str) and value != "auto":
            found.append((part.name, value))
        else:
            found += kernels_in(value)
    return found


def _require_room(plan: Plan, wanted: Wanted) -> None:
    folder = Path(os.path.realpath(wanted.out)).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write below {folder}: it is a file, not a directory")
    # AOTInductor keeps the weights in its cache and in the package until the cache goes
    copies = 3 if wanted.to == "aoti" else 1
    check_space(folder, int(plan.totals.weight_bytes * copies * 1.05) + (1 << 24))


def require_sizes(model: Any, bounds: Mapping[str, Axis], plan: Plan) -> None:
    """Raise UsageError where the design cannot run at a size that the file will be proved at."""
    for sizes in proof_sizes(bounds):
        grid = Grid(*(sizes.get(axis, 1) for axis in ("t", "h", "w")))
        if found := model.problems_at(grid):
            raise UsageError(
                f"{plan.name} cannot run at grid {grid}, so it has no open sizes: {found[0]}; export with --static, or leave "
                "only other axes open with --dynamic"
            )
