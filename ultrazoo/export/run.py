"""One export: everything that can be refused is refused before work starts, then trace, write, prove, rename."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, assemble
from ..errors import CheckFailed, OutputError, UltrazooError, UsageError, listed
from ..ports import Port
from ..recipe import Plan
from ..weights.disk import disk_errors, write_bytes
from ..weights.staging import staged, staged_file
from . import proof, record
from .before import Wanted, checked, made, opened, require_sizes
from .latents import latents_of
from .look import look
from .origin import weights_of
from .phases import one_phase
from .program import program_of
from .quiet import quiet
from .record import UNVERIFIED
from .scores import is_flash
from .sizes import Axis, proof_sizes
from .targets import Job, target

Say = Callable[[str], None]
SLACK_BYTES = 1 << 20
"""What a file holds beside its weights, at least."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the file in its directory, and the content of its export.json."""

    file: Path
    content: Mapping[str, Any]

    @property
    def ratios(self) -> list[float]:
        """Error ratio of every case that was proved, in the order of the cases."""
        return [case["ratio"] for case in self.content["proof"]["cases"] if "ratio" in case]


def export(
    source: Any,
    to: str,
    out: str | os.PathLike[str],
    *overrides: str,
    dtype: str | None = None,
    dynamic: Collection[str] | None = None,
    opset: int | None = None,
    phase: str | None = None,
    verify: bool = True,
    force: bool = False,
    device: str | None = None,
    say: Say | None = None,
) -> Exported:
    """Export a model into the directory `out`, and prove the file equal to it.

    `source` is a recipe, the directory of a built model, or such a model. `to` is ``torchscript``, ``onnx``, ``pt2`` or
    ``aoti``. `dynamic` names the axes that stay open, of b, t, h, w, text: all where None, none where empty; an axis that is
    not open has the recipe's size. `phase` is one of a step schedule's. Without `verify` nothing is proved. Raises UsageError
    for what cannot be exported, OutputError for a place that cannot be written, CheckFailed when the proof does not hold: the
    file is kept then, its name ending in ``.unverified``.
    """
    wanted = Wanted(to, Path(out), dynamic, opset, phase, verify, force)
    tell: Say = say or (lambda _: None)
    target(to)
    model, plan = opened(source, overrides, dtype)
    ports, bounds, steps = checked(plan, wanted)
    # what is made here is held by the writing alone, which lets go of it before the proof
    return _write(_ready(model, source, plan, device, tell), plan, wanted, ports, bounds, steps, tell)


def _ready(model: nn.Module | None, source: Any, plan: Plan, device: str | None, say: Say) -> nn.Module:
    """The model that was given, or one made of its source; for evaluation."""
    if model is None:
        say(f"making {plan.name} ({plan.totals.parameters:,} parameters, {plan.resolved.dtype})")
        model = made(source, plan, device)
    return model.eval()


def verify(path: str | os.PathLike[str], say: Say | None = None) -> Exported:
    """Repeat the proof of an exported file: its directory, or the file in it.

    A file that was not proved before is so from now on, and loses ``.unverified``. Raises UsageError for a file that is
    damaged or has no proof, CheckFailed when the proof does not hold.
    """
    folder, content = record.opened(path)
    module = target(content["target"])
    if why := module.absent():
        raise UsageError(why)
    record.require_whole(folder, content)
    file = folder / content["file"]
    if not file.exists():
        file = folder / (content["file"] + UNVERIFIED)
    done = _proved(file, folder, content, say or (lambda _: None))
    if not done["proof"]["holds"]:
        raise CheckFailed(_failure(file, done))
    if not content["proof"]["holds"]:
        with disk_errors(folder):
            file = file.rename(folder / content["file"])
        with staged_file(folder / record.FILE, force=True) as new:
            write_bytes(new, record.text(done))
    return Exported(file, done)


def _write(
    model: nn.Module,
    plan: Plan,
    wanted: Wanted,
    ports: tuple[Port, ...],
    bounds: Mapping[str, Axis],
    steps: tuple[int, int] | None,
    say: Say,
) -> Exported:
    with staged(wanted.out, force=wanted.force) as folder, disk_errors(wanted.out):
        laps = _Laps()
        # weights are those of the whole model: the phases of one schedule say the same of themselves
        about = {"phase": None if steps is None else list(steps), "weights": weights_of(model), "spent": laps.spent}
        with one_phase(model, steps):
            content = _made(model, plan, wanted, ports, bounds, about, folder, laps, say)
        file = folder / content["file"]
        # the file has weights of its own: two copies at a time are enough
        del model
        gc.collect()
        if wanted.verify:
            # the fresh process reads what it is to prove
            write_bytes(folder / record.FILE, record.text(content))
            content = _proved(file, folder, content, say)
            (folder / record.FILE).unlink()
            laps("proof_s")
        for one in sorted(folder.iterdir()):
            content["files"][one.name] = {"bytes": one.stat().st_size, "sha256": record.digest(one)}
        if content["proof"]["holds"] is False:
            file.rename(folder / (file.name + UNVERIFIED))
        write_bytes(folder / record.FILE, record.text(content))
    target_file = wanted.out / content["file"]
    if content["proof"]["holds"] is False:
        target_file = wanted.out / (content["file"] + UNVERIFIED)
        raise CheckFailed(_failure(target_file, content))
    return Exported(target_file, content)


class _Laps:
    """Seconds since the last call, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.clock = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name], self.clock = round(now - self.clock, 2), now


def _made(
    model: nn.Module,
    plan: Plan,
    wanted: Wanted,
    ports: tuple[Port, ...],
    bounds: Mapping[str, Axis],
    about: Mapping[str, Any],
    folder: Path,
    laps: _Laps,
    say: Say,
) -> dict[str, Any]:
    """Trace the model, write the file into `folder`, look through it, run the model for the proof: `about` and the rest of
    export.json."""
    require_sizes(model, bounds, plan)
    cases = proof_sizes(bounds)
    dtype = assemble.DTYPES[plan.resolved.dtype]
    content: dict[str, Any] = {
        **about,
        "target": wanted.to,
        "name": plan.name,
        "hash": plan.hash,
        "dtype": plan.resolved.dtype,
        "kind": "image" if plan.grid.t == 1 else "video",
        "inputs": record.ports_data(ports),
        "latents": latents_of(plan.resolved.backbone),
        "bounds": {axis: one.data() for axis, one in bounds.items()},
        "form": "index arrays, sizes open" if any(one.open for one in bounds.values()) else "index arrays, sizes fixed",
        "traced_at": cases[0],
        "torch": torch.__version__,
        # onnxruntime runs a file on the CPU wherever it was traced
        "device": "cpu" if wanted.to == "onnx" else str(next(model.parameters()).device),
        "plugins": [dict(row) for row in plan.resolved.plugins],
        "recipe": plan.resolved.data(),
    }
    if wanted.to == "onnx":
        content["opset"] = wanted.opset or target("onnx").OPSET
    job = Job(model, ports, bounds, cases[0], dtype, _embedded(content), wanted.opset)
    if wanted.to != "torchscript":
        say(f"tracing at {proof.shown(cases[0])}")
        with _told(wanted.to, wanted.out):
            job.program = program_of(model, wanted.to, ports, bounds, cases[0], dtype)
        laps("trace_s")
    say(f"writing {wanted.to}")
    _reserve(folder, plan.totals.weight_bytes)
    with _told(wanted.to, wanted.out):
        file = target(wanted.to).write(job, folder)
    laps("write_s")
    with _told(wanted.to, wanted.out):
        content["interior"] = look(job, wanted.to, file, plan)
    laps("look_s")
    content |= {"file": file.name, "files": {}, "proof": {"holds": None, "cases": []}}
    if wanted.verify:
        say(f"running the model at {len(cases)} sizes")
        zeros, rounding = proof.prepare(model, ports, cases, dtype, folder)
        content["proof"] = {
            "allowed": proof.allowed(plan.resolved.dtype, rounding),
            "rounding": rounding,
            "stand_ins": zeros,
            "cases": [{"sizes": one} for one in cases],
        }
        laps("eager_s")
    return content


def _reserve(folder: Path, weight_bytes: int) -> None:
    """Take the room for a file and give it back. Raises OSError where there is none: torch's own writers, which are C++,
    end the process on a full disk."""
    place = folder / "room"
    with place.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, weight_bytes + SLACK_BYTES)
        finally:
            place.unlink()


@contextlib.contextmanager
def _told(to: str, out: Path) -> Iterator[None]:
    """An exporter is silent, and its failure is told in one sentence; what it says at length is its cause."""
    try:
        with quiet():
            yield
    except (UltrazooError, OSError, MemoryError):
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # torch's writers say nothing of the cause
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise OutputError(
                f"cannot write {out}: torch could not finish the file; the disk may be full: free some space or choose another "
                "place with -o"
            ) from error
        raise UltrazooError(
            f"{to} could not be written: {type(error).__name__}: {lines[0] if lines else ''}; --debug shows where"
        ) from error


def _proved(file: Path, folder: Path, content: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The same content with the proof's outcome."""
    if content["proof"].get("holds") is None and not content["proof"].get("cases"):
        raise UsageError(f"{folder} was exported with --no-verify: there is nothing to compare with; export it again")
    say(f"proving {file.name} in a fresh process")
    allowed = content["proof"]["allowed"]
    if allowed > proof.ALLOWED[content["dtype"]]:
        say(
            f"  one rounding of its input moves the model by {content['proof']['rounding']:.2e}: allowed is {allowed:.2g}"
        )
    try:
        found = proof.run_fresh(file, folder)
    except UltrazooError as error:
        return {**content, "proof": {**content["proof"], "holds": False, "why": str(error)}}
    cases = []
    for case, ratio, seconds in zip(content["proof"]["cases"], found["ratios"], found["seconds"], strict=True):
        cases.append({**case, "ratio": min(ratio, 1e308), "seconds": seconds})
        say(f"  {proof.shown(case['sizes'])}: error ratio {ratio:.2e} (allowed {allowed:.2g})")
    holds = all(case["ratio"] <= allowed for case in cases) and not found["not_zero"]
    runtime = {**found["facts"], "flash": is_flash(found["facts"], content["interior"]["operators"])}
    outcome = {**content["proof"], "holds": holds, "cases": cases, "runtime": runtime, "load_s": found["load_s"]}
    outcome.pop("why", None)
    if found["not_zero"]:
        outcome["why"] = f"weights that are zero in the model are not in the file: {listed(found['not_zero'][:5])}"
    return {**content, "proof": outcome}


def _failure(file: Path, content: Mapping[str, Any]) -> str:
    found = content["proof"]
    if "why" in found:
        return f"{file} is not proved: {found['why']}"
    worst = max(found["cases"], key=lambda case: case["ratio"])
    return (
        f"{file} is not the model: at {proof.shown(worst['sizes'])} the error ratio is {worst['ratio']:.2e}, allowed is "
        f"{found['allowed']:.2g}"
    )


def _embedded(content: Mapping[str, Any]) -> dict[str, str]:
    """What stands inside the file, for whoever finds it alone."""
    kept = {key: value for key, value in content.items() if key not in ("plugins", "traced_at", "form", "spent")}
    return {"ultrazoo": json.dumps({"version": __version__, **kept})}
