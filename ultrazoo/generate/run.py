"""One run of a pipeline with a recipe's attention in it: plan, estimate, sample, save latents, decode, write."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import assemble, inplace
from ..errors import OutputError, UltrazooError, UsageError
from . import before, memory
from .decoding import KEPT, decode, forget
from .families import Request
from .latents import Latents
from .pipelines import described, open_pipeline, quiet_libraries, vae_digest, weight_elements
from .sampling import cut_off, facts_of, place, sample
from .wanted import Made, Wanted

Say = Callable[[str], None]


def generate(
    source: Any, directory: str | Path, wanted: Wanted, *overrides: str, say: Say = print, bars: bool = False
) -> Made:
    """Sample and decode with the pipeline in `directory`, its transformers running the recipe `source`.

    `source` is a recipe, or the directory of a built native model of the pipeline's own architecture. Latents are saved
    before decoding. Raises UsageError for what cannot run, OutputError for what cannot be written, before sampling where
    that can be known.
    """
    family, index = described(directory)
    before.require_places(wanted, family)
    device = torch.device(wanted.device)
    before.require_offload(wanted.offload, device)
    elements = weight_elements(directory, index)
    model = before.built_model(source, directory, family)
    if model is None:
        plan = before.plan_of(source, directory, family, wanted, overrides)
    elif overrides:
        raise UsageError(f"{source} is built: key=value changes nothing in it any more, got {overrides[0]!r}")
    else:
        plan = model.plan  # type: ignore[assignment]
        elements["transformer"] = sum(one.numel() for one in model.parameters())
    request = before.request_of(plan, wanted, family)
    grid = before.grid_of(plan, request)
    dtype = assemble.DTYPES[wanted.dtype or plan.resolved.dtype]
    before.require_room_for(grid, request, wanted, dtype.itemsize)
    samples = 2 if family.doubled and (request.guidance or 0) > 1 else 1
    tokens = grid.tokens / plan.grid.tokens
    activations = int(samples * tokens * plan.totals.activation_bytes.infer)
    found = memory.estimate(elements, dtype.itemsize, activations, family, request, device, wanted.offload)
    tiled, why = memory.tiling(found, wanted.tile)
    for line in found.lines():
        say(line)
    if tiled:
        say(f"decoding in tiles: {why}")
    start = time.perf_counter()
    with quiet_libraries():
        pipeline, _ = open_pipeline(directory, dtype, without=("transformer",) if model is not None else ())
        if model is not None:
            warned = before.built_warnings(model)
            pipeline.transformer = model.to(dtype)
        else:
            warned = list(inplace.apply(pipeline, plan).untuned)
        for line in warned:
            say(f"warning: {line}: expect a poor picture")
        if cut := cut_off(pipeline, request.prompt):
            say(f"warning: {cut}")
        place(pipeline, device, wanted.offload)
        latents = sample(pipeline, family, request, wanted.seed or 0, bars)
        latents.facts.update(facts_of(plan, index["_class_name"], vae_digest(directory)))
        sampling_s = time.perf_counter() - start
        saved = _save(latents, wanted, say)
        with _kept(saved, directory, wanted, say):
            # the last names of what decoding does not need
            del model
            forget(pipeline)
            return decode(pipeline, family, latents, replace(wanted, latents=saved), tiled, sampling_s, say)


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
    if source is not None and not found:
        given = before.hash_of_built(source)
        if given is None:
            given = before.plan_of(source, directory, family, replace(wanted, **_sizes(facts)), overrides).hash
        if given != facts["recipe_hash"]:
            found = [f"the recipe was {facts['recipe']} with hash {facts['recipe_hash'][:12]}, here it is {given[:12]}"]
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
