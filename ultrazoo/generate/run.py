"""One run of a pipeline with a recipe's attention in it: plan, estimate, sample, save latents, decode, write."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, assemble, inplace
from ..errors import OutputError, UsageError
from ..grid import Grid
from ..recipe import Plan
from ..weights import config as saved
from . import media, memory
from .families import Family, Request
from .latents import Latents, Sampled, caught
from .pipelines import described, open_pipeline, weight_elements

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for; None leaves it to the recipe, then to the pipeline."""

    prompt: str
    out: Path
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    fps: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    tile: str = "auto"
    latents: Path | None = None
    force: bool = False

    @property
    def saved(self) -> Path:
        """Where latents go: beside the output unless said otherwise."""
        return self.latents or self.out.with_name(f"{self.out.stem}.latents.safetensors")


@dataclass(frozen=True)
class Made:
    """What a run wrote. `note` stands in the file's metadata too."""

    out: Path
    latents: Path
    note: dict[str, Any]
    sampling_s: float
    decoding_s: float
    tiled: bool


def generate(
    source: Any, directory: str | Path, wanted: Wanted, *overrides: str, say: Say = print, bars: bool = False
) -> Made:
    """Sample and decode with the pipeline in `directory`, its transformer running the recipe `source`.

    `source` is a recipe, or the directory of a built native model of the pipeline's own architecture. Latents are saved
    before decoding. Raises UsageError for what cannot run, OutputError for what cannot be written, before sampling where
    that can be known.
    """
    family, index = described(directory)
    _require_places(wanted, family)
    device = torch.device(wanted.device)
    elements = weight_elements(directory, index)
    model = _built(source, family)
    plan = model.plan if model is not None else _plan(source, directory, family, wanted, overrides)
    request = _request(plan, wanted, family)
    dtype = assemble.DTYPES[wanted.dtype or plan.resolved.dtype]
    samples = 2 if family.doubled and (request.guidance or 0) > 1 else 1
    found = memory.estimate(
        elements, dtype.itemsize, samples * plan.totals.activation_bytes.infer, family, request, device
    )
    tiled, why = memory.tiling(found, wanted.tile)
    for line in found.lines():
        say(line)
    if tiled:
        say(f"decoding in tiles: {why}")
    _warn(plan, say)
    pipeline, _ = open_pipeline(directory, dtype)
    start = time.perf_counter()
    with torch.no_grad():
        latents = _sample(pipeline, family, plan, model, request, wanted, device, index["_class_name"], bars)
    sampling_s = time.perf_counter() - start
    latents.save(wanted.saved, wanted.force)
    say(f"latents saved: {wanted.saved}")
    _forget(pipeline)
    return _decode(pipeline, family, latents, wanted, tiled, sampling_s, say)


def resume(directory: str | Path, file: str | Path, wanted: Wanted, say: Say = print) -> Made:
    """Decode saved latents with the pipeline in `directory`, of which only the decoders are loaded."""
    latents = Latents.load(file)
    family, index = described(directory)
    if latents.facts["pipeline"] != index["_class_name"]:
        raise UsageError(f"{file} was sampled by {latents.facts['pipeline']}, {directory} is {index['_class_name']}")
    _require_places(wanted, family, latents=False)
    dtype = assemble.DTYPES[wanted.dtype or latents.facts["dtype"]]
    pipeline, _ = open_pipeline(directory, dtype, decoders_only=True)
    video = latents.video[0]
    if video.shape[1:] and not torch.isfinite(video.float()).all():
        raise UsageError(f"{file} holds values that are not finite: sampling went wrong, decoding cannot help")
    return _decode(pipeline, family, latents, wanted, wanted.tile == "on", 0.0, say)


def _require_places(wanted: Wanted, family: Family, latents: bool = True) -> None:
    if not wanted.prompt.strip() and latents:
        raise UsageError("the prompt is empty; say what to make with --prompt")
    media.require_suffix(wanted.out, family.kind)
    for place in (wanted.out, wanted.saved) if latents else (wanted.out,):
        if place.exists() and not wanted.force:
            raise OutputError(f"{place} exists; choose another name with -o or replace it with --force")


def _built(source: Any, family: Family) -> Any:
    """A native model that `build` or `save` wrote into the directory `source`; None when it is a recipe."""
    if not isinstance(source, str | Path) or not (Path(source) / saved.FILE).is_file():
        return None
    model = assemble.from_pretrained(source)
    if inplace.NATIVE.get(model.plan.resolved.backbone.name) != family.model:
        raise UsageError(
            f"{source} is a {model.plan.resolved.backbone.name!r} model, the pipeline is for {family.model}"
        )
    return model


def _plan(source: Any, directory: str | Path, family: Family, wanted: Wanted, overrides: tuple[str, ...]) -> Plan:
    given = {
        "video.width": wanted.width,
        "video.height": wanted.height,
        "video.frames": wanted.frames,
        "sampling.steps": wanted.steps,
        "sampling.guidance": wanted.guidance,
        "dtype": wanted.dtype,
    }
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    if wanted.width is not None or wanted.height is not None:
        more.insert(0, "video.grid=null")
    node = {"name": "diffusers", "model": family.model, "config": str(Path(directory).absolute() / "transformer")}
    return inplace.plan_for(node, source, (*overrides, *more))


def _request(plan: Plan, wanted: Wanted, family: Family) -> Request:
    sampling, video = plan.resolved.sampling, plan.resolved.video
    steps = wanted.steps or (sampling.steps if sampling else None)
    if steps is None:
        raise UsageError("neither the recipe nor --steps says how many denoising steps to make")
    width, height, frames = video.width, video.height, video.frames
    if width is None or height is None:
        width, height, frames = plan.resolved.backbone.geometry.pixels(Grid(*plan.grid))  # type: ignore[attr-defined]
    if family.kind == "image" and frames != 1:
        raise UsageError(f"this pipeline makes one image and the recipe asks for {frames} frames; set video.frames=1")
    guidance = wanted.guidance if wanted.guidance is not None else (sampling.guidance if sampling else None)
    return Request(wanted.prompt, width, height, frames, steps, guidance, wanted.negative)


def _warn(plan: Plan, say: Say) -> None:
    """Say that a design needs tuning, unless tuned weights are loaded."""
    if plan.resolved.weights is not None:
        return
    specs = {spec.name: spec for spec in plan.resolved.written}
    for name, spec in sorted(specs.items()):
        start = spec.traits().start
        if start.kind == "needs tuning":
            say(f"warning: {name} needs tuning ({start.source}) and no tuned weights are loaded: expect a poor picture")


def _sample(
    pipeline: Any,
    family: Family,
    plan: Plan,
    model: nn.Module | None,
    request: Request,
    wanted: Wanted,
    device: torch.device,
    name: str,
    bars: bool,
) -> Latents:
    if model is not None:
        pipeline.transformer = model.to(next(pipeline.transformer.parameters()).dtype)
    else:
        inplace.apply(pipeline, plan)
    pipeline.to(device)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=not bars)
    if family.guider and request.guidance is not None:
        pipeline.guider = pipeline.guider.new(guidance_scale=request.guidance)
    arguments = family.arguments(request)
    generator = torch.Generator().manual_seed(wanted.seed)
    with _stepping(pipeline, request.steps), caught(pipeline, family.audio) as found, contextlib.suppress(Sampled):
        pipeline(**arguments, generator=generator)
    if found.video is None:
        raise UsageError(f"{name} ended without calling its VAE: its call differs from what generate knows")
    facts = {
        "ultrazoo": __version__,
        "pipeline": name,
        "recipe": plan.name,
        "recipe_hash": plan.hash,
        "seed": wanted.seed,
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "steps": request.steps,
        "guidance": request.guidance,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
    }
    return Latents(found.video, found.audio, facts)


@contextlib.contextmanager
def _stepping(pipeline: Any, steps: int) -> Iterator[None]:
    """Tell the models before each forward at which of `steps` they are, by the scheduler's own count."""
    scheduler = pipeline.scheduler

    def tell(model: nn.Module, *_: Any) -> None:
        session: Any = model.session
        # a scheduler that evaluates twice per step counts both
        count = max(len(scheduler.timesteps), 1)
        index = scheduler.step_index or 0
        session.select(min(index * steps // count, steps - 1), steps, session.branch)

    models = [getattr(pipeline, name, None) for name in inplace.COMPONENTS]
    models = [model for model in models if hasattr(model, "session")]
    handles = [model.register_forward_pre_hook(tell, prepend=True) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for model in models:
            model.session.deselect()
            model.session.reset_state()


def _forget(pipeline: Any) -> None:
    """Drop what decoding does not need: transformers and text encoders."""
    for name, part in list(vars(pipeline).items()):
        if isinstance(part, nn.Module) and name not in ("vae", "audio_vae", "vocoder"):
            setattr(pipeline, name, None)


def _decode(
    pipeline: Any, family: Family, latents: Latents, wanted: Wanted, tiled: bool, sampling_s: float, say: Say
) -> Made:
    start = time.perf_counter()
    device = torch.device(wanted.device)
    if tiled:
        pipeline.vae.enable_tiling()
    with torch.no_grad():
        decoded = _through(pipeline.vae, latents.video, device)[0]
        frames = family.processor(pipeline, family.picked(decoded))
        audio = None if latents.audio is None else _sound(pipeline, latents.audio, device)
    note = {key: value for key, value in latents.facts.items() if value is not None}
    if family.kind == "image":
        media.write_image(wanted.out, media.pixels(frames[0]), note, wanted.force)
    else:
        media.write_video(wanted.out, media.pixels(frames[0]), wanted.fps or family.fps, note, audio, wanted.force)
    say(f"written: {wanted.out}")
    return Made(wanted.out, wanted.saved, note, sampling_s, time.perf_counter() - start, tiled)


def _through(part: nn.Module, arguments: tuple[Any, ...], device: torch.device) -> Any:
    part.to(device)
    kind = next(part.parameters()).dtype
    moved = [one.to(device, kind) if isinstance(one, torch.Tensor) else one for one in arguments]
    return part.decode(*moved, return_dict=False)  # type: ignore[operator]


def _sound(pipeline: Any, arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, int]:
    """Samples (channels, n) in [-1, 1] and their rate."""
    heard = _through(pipeline.audio_vae, arguments, device)[0]
    vocoder = getattr(pipeline, "vocoder", None)
    if vocoder is None:
        rate = pipeline.audio_vae.config.sampling_rate
        return heard.float().cpu().reshape(-1, heard.shape[-1]).numpy(), int(rate)
    samples = vocoder.to(device)(heard)
    return samples[0].float().cpu().numpy(), int(vocoder.config.output_sampling_rate)
