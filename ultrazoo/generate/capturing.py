"""Capturing a pipeline's own queries, keys and values while it samples, prompt by prompt; nothing is decoded.

What a run writes is estimated before the pipeline is opened. A run that was cut off is repeated: prompts that are complete are
skipped, others are sampled again from the same noise and only what is missing is written.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import assemble, inplace
from ..analysis.capture import LIMIT_BYTES, Enough, Recorder, chosen, item_bytes
from ..analysis.capture_files import INDEX, Capture, ModelFacts
from ..errors import UsageError
from ..recipe import Plan
from ..weights.disk import check_space, human
from . import before
from .families import Request
from .pipelines import described, open_pipeline, quiet_libraries, transformers_digest, vae_digest
from .sampling import place, run
from .wanted import Wanted

Say = Callable[[str], None]


@dataclass(frozen=True)
class CaptureWanted:
    """What is asked of a capture. `steps`, `layers` and `heads` are keys as in recipes; `sampling_steps` is how many steps the
    pipeline makes; sizes in pixels; `seed` of the noise of the first prompt, each further one takes the next; `limit` in bytes."""

    prompts: tuple[str, ...]
    out: Path
    width: int
    height: int
    frames: int = 1
    sampling_steps: int = 30
    steps: str = "*"
    layers: str = "*"
    heads: str = "*"
    inputs: bool = False
    guidance: float | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    offload: bool = False
    limit: int = LIMIT_BYTES


@dataclass(frozen=True)
class Estimate:
    """Files and bytes that a capture comes to, by what a plan says of its layers."""

    files: int
    nbytes: int


def prompts_in(file: str | Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line, empty lines left out. Raises UsageError for none."""
    lines = (line.strip() for line in before.prompt_in(file).splitlines())
    return tuple(line for line in lines if line)


def capture_pipeline(directory: str | Path, wanted: CaptureWanted, say: Say = print) -> Capture:
    """Sample every prompt with the pipeline in `directory` and record what was asked for.

    Raises UsageError for what cannot be captured or would pass the limit, OutputError for a place that is too small, cannot be
    written or holds another capture; before sampling where that can be known.
    """
    if not wanted.prompts:
        raise UsageError("there is no prompt: give a file with one a line")
    device, dtype = torch.device(wanted.device), assemble.DTYPES[wanted.dtype]
    before.require_offload(wanted.offload, device)
    family, index = described(directory)
    if family.kind == "video" and wanted.frames == 1:
        say("one frame is captured; --frames says how many")
    plan, request = _planned(directory, wanted, family)
    steps = chosen(wanted.steps, {"": wanted.sampling_steps}, "step", f"sampling with {wanted.sampling_steps} steps")
    found = estimate(plan, wanted, len(steps))
    say(f"{found.files} files, about {human(found.nbytes)}")
    _require_room(wanted, found)
    asked = _request(directory, index, wanted)
    if _done(wanted.out, asked):
        say(f"{wanted.out} is complete: nothing to do")
        return Capture.load(wanted.out)
    with quiet_libraries():
        pipeline, _ = open_pipeline(directory, dtype)
        inplace.apply(pipeline, plan)
        place(pipeline, device, wanted.offload)
        parts: dict[str, Any] = {name: getattr(pipeline, name, None) for name in inplace.COMPONENTS}
        models = {name: model for name, model in parts.items() if hasattr(model, "session")}
        recorder = Recorder(
            models,
            wanted.out,
            asked,
            layers=wanted.layers,
            heads=wanted.heads,
            inputs=wanted.inputs,
            limit=wanted.limit,
            steps=steps,
            # of a batch that guidance doubles, the second half has the prompt
            rows=slice(-1, None) if family.doubled else slice(None),
            ends=True,
        )
        with recorder:
            for sample, prompt in enumerate(wanted.prompts):
                if not recorder.lacks(sample):
                    say(f"prompt {sample + 1} of {len(wanted.prompts)} is there")
                    continue
                recorder.sample, had = sample, recorder.written
                _sample(pipeline, family, replace(request, prompt=prompt), wanted.seed + sample)
                say(f"prompt {sample + 1} of {len(wanted.prompts)}: {recorder.written - had} files")
                if recorder.lacks(sample):
                    raise UsageError(
                        f"{type(pipeline).__name__} ended before some of the steps or layers asked for ran: its scheduler makes "
                        f"other steps than {wanted.sampling_steps}"
                    )
    return recorder.capture


def _sample(pipeline: Any, family: Any, request: Request, seed: int) -> None:
    """Run the denoising steps up to the last that is wanted."""
    with _no_decoding(pipeline), contextlib.suppress(Enough):
        run(pipeline, family, request, seed)


@contextlib.contextmanager
def _no_decoding(pipeline: Any) -> Any:
    """The VAE ends the run when it is asked to decode."""

    def decode(*_: Any, **__: Any) -> Any:
        raise Enough

    vars(pipeline.vae)["decode"] = decode
    try:
        yield
    finally:
        vars(pipeline.vae).pop("decode", None)


def _planned(directory: str | Path, wanted: CaptureWanted, family: Any) -> tuple[Plan, Request]:
    one = Wanted(
        prompt=wanted.prompts[0],
        out=wanted.out,
        width=wanted.width,
        height=wanted.height,
        frames=wanted.frames,
        steps=wanted.sampling_steps,
        guidance=wanted.guidance,
        seed=wanted.seed,
        dtype=wanted.dtype,
    )
    plan = before.plan_of({"name": "capture", "attention": {"*": {"name": "full"}}}, directory, family, one, ())
    return plan, before.request_of(plan, one, family)


def estimate(plan: Plan, wanted: CaptureWanted, steps: int) -> Estimate:
    """What the layers asked for come to at the plan's grid, for `steps` steps of every prompt. Raises UsageError for layers or
    heads that do not exist."""
    resolved = plan.resolved
    spec, sites = resolved.backbone, resolved.sites
    layers = chosen(wanted.layers, spec.groups(), "layer", spec.name)
    heads = len(chosen(wanted.heads, {"": sites[0].heads}, "head", spec.name))
    itemsize = assemble.DTYPES[wanted.dtype].itemsize
    facts = ModelFacts("", spec.name, spec.groups(), sites[0], False, "loaded")
    size = sum(
        item_bytes(facts, plan.grid.tokens, sites[layer].extra_tokens, heads, wanted.inputs, itemsize)
        for layer in layers
    )
    times = steps * len(wanted.prompts)
    width, dim = sites[0].heads * sites[0].head_dim, sites[0].dim
    projections = 3 * width * (dim + 1) * itemsize if wanted.inputs else 0
    return Estimate(times * len(layers), times * size + len(layers) * projections)


def _require_room(wanted: CaptureWanted, found: Estimate) -> None:
    if found.nbytes > wanted.limit:
        raise UsageError(
            f"this capture comes to about {human(found.nbytes)} in {found.files} files, the limit is {human(wanted.limit)}: take "
            "fewer prompts, steps, layers or heads, a smaller size, or raise --limit"
        )
    # a file is to stand in it
    folder = before.folder_for(wanted.out / INDEX)
    there = Capture.load(wanted.out).nbytes if (wanted.out / INDEX).is_file() else 0
    check_space(folder, max(0, found.nbytes - there))


def _request(directory: str | Path, index: dict[str, Any], wanted: CaptureWanted) -> dict[str, Any]:
    """What makes a capture another one."""
    prompts = hashlib.sha256("\n".join(wanted.prompts).encode()).hexdigest()
    return {
        "by": "pipeline",
        "pipeline": index["_class_name"],
        "transformer": transformers_digest(directory),
        "vae": vae_digest(directory),
        "prompts": prompts,
        "width": wanted.width,
        "height": wanted.height,
        "frames": wanted.frames,
        "sampling_steps": wanted.sampling_steps,
        "steps": wanted.steps,
        "layers": wanted.layers,
        "heads": wanted.heads,
        "inputs": wanted.inputs,
        "guidance": wanted.guidance,
        "seed": wanted.seed,
        "dtype": wanted.dtype,
    }


def _done(out: Path, asked: dict[str, Any]) -> bool:
    if not (out / INDEX).is_file():
        return False
    held = Capture.load(out)
    return held.complete and dict(held.request) == asked and all(held.whole(item) for item in held.items)
