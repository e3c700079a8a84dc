"""One run of a pipeline with a recipe's attention in it: plan, estimate, sample, save latents, decode, write."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import assemble, inplace
from ..errors import OutputError, UltrazooError, UsageError
from ..recipe import Plan
from . import before, memory
from .decoding import KEPT, decode, forget
from .engine import EngineModel, digests, facts_in, recipe_hash
from .engine_checks import engine_model, notes, require_run
from .families import Family, Request
from .latents import Latents
from .pipelines import described, open_pipeline, quiet_libraries, vae_digest, weight_elements
from .sampling import cut_off, facts_of, place, sample
from .wanted import Made, Wanted

Say = Callable[[str], None]


def generate(
    source: Any, directory: str | Path, wanted: Wanted, *overrides: str, say: Say = print, bars: bool = False
) -> Made:
    """Sample and decode with the pipeline in `directory`, its transformers running the recipe `source`.

    `source` is a recipe, or the directory of a built native model of the pipeline's own architecture. With `wanted.engines`
    exported files take the transformer's place; `source` may be None then. Latents are saved before decoding. Raises UsageError for what cannot run, OutputError for what cannot be written, before sampling where
    that can be known.
    """
    family, index = described(directory)
    ready = _ready(source, directory, family, index, wanted, overrides, say)
    request, plan, model = ready.request, ready.plan, ready.model
    start = time.perf_counter()
    with quiet_libraries():
        if isinstance(model, EngineModel):
            # what a runtime does not take is seen before gigabytes of text encoder are read
            model.engines[0].load()
        dtype = assemble.DTYPES[wanted.dtype or plan.resolved.dtype]
        pipeline, _ = open_pipeline(directory, dtype, without=("transformer",) if model is not None else ())
        if model is None:
            warned = list(inplace.apply(pipeline, plan).untuned)
        else:
            warned = model.warnings() if isinstance(model, EngineModel) else before.built_warnings(model)
            pipeline.transformer = model.to(dtype)
        for line in warned:
            say(f"warning: {line}: expect a poor picture")
        if cut := cut_off(pipeline, request.prompt):
            say(f"warning: {cut}")
        place(pipeline, torch.device(wanted.device), wanted.offload)
        latents = sample(pipeline, family, request, wanted.seed or 0, bars)
        latents.facts.update(facts_of(plan, index["_class_name"], vae_digest(directory)))
        if isinstance(model, EngineModel):
            latents.facts["engine"] = model.facts()
        sampling_s = time.perf_counter() - start
        saved = _save(latents, wanted, say)
        with _kept(saved, directory, wanted, say):
            # the last names of what decoding does not need
            ready.model = None
            del model
            forget(pipeline)
            return decode(pipeline, family, latents, replace(wanted, latents=saved), ready.tiled, sampling_s, say)


@dataclass
class _Ready:
    """What is settled before a run starts. `model` takes the transformer's place; None: a recipe goes into it."""

    model: nn.Module | None
    plan: Plan
    request: Request
    tiled: bool


def _ready(
    source: Any,
    directory: str | Path,
    family: Family,
    index: dict[str, Any],
    wanted: Wanted,
    overrides: tuple[str, ...],
    say: Say,
) -> _Ready:
    before.require_places(wanted, family)
    device = torch.device(wanted.device)
    before.require_offload(wanted.offload, device)
    elements = weight_elements(directory, index)
    model: nn.Module | None
    if wanted.engines:
        model = engine_model(source, directory, family, wanted, overrides)
    else:
        model = before.built_model(source, directory, family)
    if model is None:
        plan = before.plan_of(source, directory, family, wanted, overrides)
    elif overrides and not isinstance(model, EngineModel):
        raise UsageError(f"{source} is built: key=value changes nothing in it any more, got {overrides[0]!r}")
    else:
        plan = model.plan  # type: ignore[assignment]
        elements["transformer"] = plan.totals.parameters
    request = before.request_of(plan, wanted, family)
    grid = before.grid_of(plan, request)
    size = assemble.DTYPES[wanted.dtype or plan.resolved.dtype].itemsize
    before.require_room_for(grid, request, wanted, size)
    samples = 2 if family.doubled and (request.guidance or 0) > 1 else 1
    activations = int(samples * grid.tokens / plan.grid.tokens * plan.totals.activation_bytes.infer)
    stay: tuple[str, ...] = ()
    if isinstance(model, EngineModel):
        require_run(model, request, grid, samples, index["_class_name"])
        activations = samples * model.activation_bytes(grid)
        for line in notes(model, device, elements["transformer"] * size + activations):
            say(line)
        stay = ("transformer",)
        if model.engines[0].device.type != device.type:
            del elements["transformer"]
            activations = 0
    found = memory.estimate(elements, size, activations, family, request, device, wanted.offload, stay)
    tiled, why = memory.tiling(found, wanted.tile)
    for line in found.lines():
        say(line)
    if tiled:
        say(f"decoding in tiles: {why}")
    return _Ready(model, plan, request, tiled)


def resume(
    directory: str | Path, file: str | Path, wanted: Wanted, *overrides: str, source: Any = None, say: Say = print
) -> Made:
    """Decode saved latents with the pipeline in `directory`, of which only the decoders are loaded.

    Whatever `wanted` or the recipe `source` says beside them must be what the latents were sampled with: raises UsageError
    that names every difference.
    """
    latents = Latents.load(file)
    family, index = described(directory)
    before.require_places(wanted, family, latents=False)
    facts = latents.facts
    found = before.differences(latents, directory, index["_class_name"], wanted)
    if not found:
        found = _another_model(source, directory, family, wanted, overrides, facts)
    if found:
        raise UsageError(f"{file} holds latents of another run: {'; '.join(found)}")
    if not all(torch.isfinite(one).all() for one in latents.video if isinstance(one, torch.Tensor)):
        raise UsageError(f"{file} holds values that are not finite: sampling went wrong, decoding cannot help")
    device = torch.device(wanted.device)
    before.require_offload(wanted.offload, device)
    dtype = assemble.DTYPES[wanted.dtype or facts["dtype"]]
    elements = {name: n for name, n in weight_elements(directory, index).items() if name in KEPT}
    request = Request(facts["prompt"], facts["width"], facts["height"], facts["frames"], facts["steps"])
    tiled, why = memory.tiling(memory.estimate(elements, dtype.itemsize, 0, family, request, device), wanted.tile)
    if tiled:
        say(f"decoding in tiles: {why}")
    with quiet_libraries():
        pipeline, _ = open_pipeline(directory, dtype, decoders_only=True)
        with _kept(Path(file), directory, wanted, say):
            return decode(pipeline, family, latents, replace(wanted, latents=Path(file)), tiled, 0.0, say)


def _another_model(
    source: Any,
    directory: str | Path,
    family: Family,
    wanted: Wanted,
    overrides: tuple[str, ...],
    facts: Mapping[str, Any],
) -> list[str]:
    """Where the recipe or the engines given beside saved latents are not those that they were sampled with."""
    engine = facts.get("engine")
    found = []
    if wanted.engines and engine != (here := facts_in(wanted.engines)):
        was = "no exported file" if engine is None else digests(engine)
        found.append(f"the engine was {was}, here it is {digests(here)}")
    if source is None:
        return found
    given = before.hash_of_built(source)
    if engine is not None:
        given = recipe_hash(source, overrides, facts["dtype"])
    elif given is None:
        given = before.plan_of(source, directory, family, replace(wanted, **_sizes(facts)), overrides).hash
    if given != facts["recipe_hash"]:
        found.append(f"the recipe was {facts['recipe']} with hash {facts['recipe_hash'][:12]}, here it is {given[:12]}")
    return found


def _sizes(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("width", "height", "frames", "steps", "guidance", "dtype")}


def _save(latents: Latents, wanted: Wanted, say: Say) -> Path:
    """Save latents where they are wanted, or in the system's folder for temporary files where that fails."""
    try:
        latents.save(wanted.saved, wanted.force)
    except OutputError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="ultrazoo-latents-")) / wanted.saved.name
        try:
            latents.save(elsewhere)
        except OutputError:
            elsewhere.parent.rmdir()
            raise error from None
        say(f"warning: {error}")
        say(f"latents saved elsewhere: {elsewhere}")
        return elsewhere
    say(f"latents saved: {wanted.saved}")
    return wanted.saved


@contextlib.contextmanager
def _kept(saved: Path, directory: str | Path, wanted: Wanted, say: Say) -> Iterator[None]:
    """Say how to go on from the latents when decoding or writing fails or is interrupted."""
    again = f"ultrazoo generate --pipeline {directory} --from-latents {saved} -o {wanted.out}"
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{error}\nthe latents are kept; go on with: {again}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UltrazooError(
            f"decoding ran out of memory ({str(error).splitlines()[0] if str(error) else 'no more was said'})\n"
            f"the latents are kept; go on in tiles with: {again} --tile on"
        ) from error
    except BaseException:
        say(f"the latents are kept; go on with: {again}")
        raise
