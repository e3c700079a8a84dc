"""What is settled before a run starts, so that hours of sampling do not end in a mistake that could be seen at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import assemble, inplace
from ..analysis.capture import fresh
from ..backbones import recognised
from ..backbones.diffusers.spec import DiffusersSpec
from ..errors import OutputError, RecipeError, UsageError
from ..grid import Grid
from ..options import frozen
from ..recipe import Plan
from ..spec import Video
from ..weights import config as saved
from ..weights.disk import human
from . import media
from .families import Family, Request
from .latents import Latents
from .pipelines import settings_of, vae_digest
from .wanted import Wanted

MARGIN_BYTES = 1 << 20


def require_places(wanted: Wanted, family: Family, latents: bool = True) -> None:
    """Raise UsageError or OutputError where output or (with `latents`) latents could not be written."""
    if latents and not wanted.prompt.strip():
        raise UsageError("the prompt is empty; say what to make with --prompt or --prompt-file")
    media.require_suffix(wanted.out, family.kind)
    if wanted.fps is not None and not 0 < wanted.fps <= 1000:
        raise UsageError(f"frames per second are above 0 and at most 1000, got {wanted.fps:g}")
    places = (wanted.out, wanted.saved) if latents else (wanted.out,)
    if latents and wanted.out.absolute() == wanted.saved.absolute():
        raise UsageError(f"{wanted.out}: latents and output cannot be one file; choose another name with --latents")
    for place in places:
        if place.is_dir():
            raise OutputError(f"{place} is a directory; name a file with -o")
        if place.exists() and not wanted.force:
            raise OutputError(f"{place} exists; choose another name with -o or replace it with --force")
        _require_room(place, MARGIN_BYTES)


def require_offload(offload: bool, device: torch.device) -> None:
    """Raise UsageError where nothing can be offloaded."""
    if offload and device.type == "cpu":
        raise UsageError("--offload keeps models in the CPU's memory while they wait for a GPU; add --device cuda")


def require_room_for(grid: Grid, request: Request, wanted: Wanted, itemsize: int) -> None:
    """Raise OutputError where latents and output would not fit on the disk.

    128 channels are as many as any VAE's here; the output is taken for a fifth of its pixels.
    """
    latents = grid.tokens * 4 * 128 * itemsize
    _require_room(wanted.saved, latents + MARGIN_BYTES)
    _require_room(wanted.out, request.frames * request.width * request.height * 3 // 5 + MARGIN_BYTES)


def folder_for(place: Path) -> Path:
    """The nearest folder above `place` that exists. Raises OutputError where nothing can be written into it."""
    folder = place.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {place}: {folder} is a file, not a directory")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {place}: permission denied in {folder}; choose another place with -o")
    return folder


def _require_room(place: Path, need: int) -> None:
    folder = folder_for(place)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(f"cannot write {place}: {human(free)} are free there and about {human(need)} are needed")


def prompt_in(file: str | Path) -> str:
    """The prompt that a text file holds, without the space around it. Raises UsageError for none."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text:
        raise UsageError(f"{file} is empty: no prompt to make anything of")
    return text


FITTING = (
    *("in_channels", "out_channels", "audio_in_channels", "audio_out_channels"),
    *("text_dim", "caption_channels", "joint_attention_dim", "text_embed_dim", "text_embed_2_dim"),
)
"""Settings of a transformer that its VAE and text encoders decide."""


def built_model(source: Any, directory: str | Path, family: Family) -> nn.Module | None:
    """The model that `build` or `save` wrote into the directory `source`, native or of the pipeline's class; None when it is
    a recipe.

    Raises UsageError for another model than the pipeline's, or one that its VAE or text encoder does not fit.
    """
    if not _is_built(source):
        return None
    if saved.holds_new(saved.read(Path(source))):
        raise UsageError(
            f"{source} holds the new parameters of a design alone, which go into the pipeline's own transformer: give its "
            f"recipe and them, {Path(source) / 'recipe.yaml'} weights.path={source}"
        )
    require_one_transformer(source, directory)
    model: Any = assemble.from_pretrained(source)
    require_kind(source, model.plan, family)
    require_fit(source, model, directory, family)
    return model  # type: ignore[no-any-return]


def require_one_transformer(source: Any, directory: str | Path) -> None:
    """Raise UsageError for a pipeline with two transformers, whose place one model cannot take."""
    if (Path(directory) / "transformer_2").is_dir():
        raise UsageError(f"{directory} has two transformers, and {source} would take the place of one; use a recipe")


def require_kind(source: Any, plan: Plan, family: Family) -> None:
    """Raise UsageError where the model of `plan` is not the one that the pipeline calls."""
    node = plan.resolved.data()["backbone"]
    if not recognised.same(node, {"name": "diffusers", "model": family.model}):
        what = "/".join(node[key] for key in ("name", "model") if key in node)
        raise UsageError(f"{source} is a {what!r} model, the pipeline is for {family.model}")


def require_fit(source: Any, model: Any, directory: str | Path, family: Family) -> None:
    """Raise UsageError where the pipeline's VAE or text encoder does not fit `model`, which has a config and a plan."""
    due = settings_of(directory, "transformer")
    differ = [
        f"{key} is {model.config[key]}, the pipeline's {due[key]}"
        for key in FITTING
        if key in due and model.config.get(key, due[key]) != due[key]
    ]
    got = model.plan.resolved.backbone.geometry.strides
    vae = family.strides(settings_of(directory, "vae"))
    if vae is not None and any(b not in (None, a) for a, b in zip(got, vae, strict=True)):
        differ.append(f"it is for a VAE with strides {tuple(got)} over (T, H, W), the pipeline's are {vae}")
    if differ:
        raise UsageError(f"{source} does not fit the pipeline in {directory}: {'; '.join(differ)}")


def _is_built(source: Any) -> bool:
    return isinstance(source, str | Path) and (Path(source) / saved.FILE).is_file()


def hash_of_built(source: Any) -> str | None:
    """The recipe's hash of the built model in the directory `source`; None when it is a recipe."""
    if not _is_built(source):
        return None
    found: str = saved.read(Path(source))["hash"]
    return found


def plan_of(source: Any, directory: str | Path, family: Family, wanted: Wanted, overrides: tuple[str, ...]) -> Plan:
    """The plan of a recipe on the pipeline's transformer, at the size asked for, with the strides of the pipeline's VAE."""
    given = {
        "video.width": wanted.width,
        "video.height": wanted.height,
        "video.frames": wanted.frames,
        "sampling.steps": wanted.steps,
        "sampling.guidance": wanted.guidance,
        "dtype": wanted.dtype,
    }
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    if wanted.width is not None and wanted.height is not None:
        # a whole size takes the place of a grid; one side alone is for a recipe that has the other
        more.insert(0, "video.grid=null")
    config = str(Path(directory).absolute() / "transformer")
    node: dict[str, Any] = {"name": "diffusers", "model": family.model, "config": config}
    settings = settings_of(directory, "transformer")
    usual = DiffusersSpec(model=family.model, config=frozen(_plain(settings))).geometry.strides
    vae = family.strides(settings_of(directory, "vae"))
    due = usual if vae is None else tuple(a if b is None else b for a, b in zip(usual, vae, strict=True))
    if due != usual:
        node["strides"] = list(due)
    plan = inplace.plan_for(node, source, (*overrides, *more))
    got = plan.resolved.backbone.geometry.strides  # type: ignore[attr-defined]
    if tuple(got) != due:
        raise UsageError(
            f"the recipe says that the VAE's strides over (T, H, W) are {tuple(got)}, those of {directory} are {due}; "
            "leave backbone.strides out"
        )
    return plan


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in settings.items() if not key.startswith("_")}))  # type: ignore[no-any-return]


def request_of(plan: Plan, wanted: Wanted, family: Family) -> Request:
    """Sizes, steps and guidance of a run. Raises UsageError for sizes or steps that the plan's model cannot make."""
    sampling, video = plan.resolved.sampling, plan.resolved.video
    steps = wanted.steps or (sampling.steps if sampling else None)
    if steps is None:
        raise UsageError("neither the recipe nor --steps says how many denoising steps to make")
    if plan.resolved.steps and sampling is not None and sampling.steps != steps:
        raise UsageError(
            f"the model was built with other attention at some of {sampling.steps} steps, got --steps {steps}; build it "
            f"again with sampling.steps={steps}"
        )
    geometry = plan.resolved.backbone.geometry  # type: ignore[attr-defined]
    width, height, frames = video.width, video.height, video.frames
    if width is None or height is None:
        width, height, frames = geometry.pixels(Grid(*plan.grid))
    width, height, frames = wanted.width or width, wanted.height or height, wanted.frames or frames
    _, problems = geometry.grid(Video(width=width, height=height, frames=frames))
    if problems:
        raise RecipeError("what is asked for", problems)
    if family.kind == "image" and frames != 1:
        raise UsageError(f"this pipeline makes one image and {frames} frames are asked for; set video.frames=1")
    if family.lengths is not None and not family.lengths[0] <= frames <= family.lengths[1]:
        least, most = family.lengths
        raise UsageError(f"this pipeline makes {least} to {most} frames and {frames} are asked for; set video.frames")
    guidance = wanted.guidance if wanted.guidance is not None else (sampling.guidance if sampling else None)
    if family.distilled and ((guidance or 1) != 1 or wanted.negative is not None):
        raise UsageError(
            f"the guidance of {family.model} is in its weights: it takes no scale and no negative prompt; leave out "
            "sampling.guidance, --guidance and --negative-prompt"
        )
    if wanted.negative is not None and not family.negative:
        raise UsageError("this pipeline takes no negative prompt; leave --negative-prompt out")
    if wanted.negative is not None and guidance is not None and guidance <= 1:
        raise UsageError(f"a negative prompt is what guidance above 1 keeps away from, and guidance is {guidance:g}")
    return Request(wanted.prompt, width, height, frames, steps, guidance, wanted.negative)


def grid_of(plan: Plan, request: Request) -> Grid:
    """The token grid of a request that `request_of` let pass."""
    size = Video(width=request.width, height=request.height, frames=request.frames)
    grid: Grid = plan.resolved.backbone.geometry.grid(size)[0]  # type: ignore[attr-defined]
    return grid


def differences(latents: Latents, directory: str | Path, name: str, wanted: Wanted) -> list[str]:
    """What of saved latents is not as the pipeline in `directory`, or as what is asked for; empty where all agrees."""
    facts = latents.facts
    found = []
    if facts["pipeline"] != name:
        return [f"the pipeline was {facts['pipeline']}, {directory} is {name}"]
    if facts["vae"] != vae_digest(directory):
        found.append(f"the VAE in {directory} has other settings than the one they are for")
    settings = settings_of(directory, "vae")
    channels = settings.get("z_dim", settings.get("latent_channels"))
    shape = tuple(latents.video[0].shape)
    if channels is not None and (len(shape) < 4 or shape[1] != channels):
        found.append(f"their shape is {shape}, the VAE in {directory} decodes {channels} channels")
    names = ("width", "height", "frames", "steps", "guidance", "seed")
    asked: dict[str, Any] = {name: getattr(wanted, name) for name in names}
    asked |= {"prompt": wanted.prompt.strip() or None, "negative_prompt": wanted.negative}
    found += [
        f"{key} was {facts[key]!r}, asked for is {value!r}"
        for key, value in asked.items()
        if value is not None and facts[key] != value
    ]
    return found


TUNED = ("ultrazoo", "ultragen")
"""Formats of files whose numbers belong to a design, not to the model as it was released."""


def built_warnings(model: nn.Module) -> list[str]:
    """What is to be said of a built model before it runs."""
    return warnings_of(model.plan, getattr(model, "origin", None) or {}, fresh(model))  # type: ignore[arg-type]


def warnings_of(plan: Plan, origin: Mapping[str, Any], random: bool) -> list[str]:
    """What is to be said of a model whose numbers come from `origin`: that they are `random`, or that nothing was tuned
    for its design."""
    if random:
        return [f"{plan.name} was built without weights: its numbers are random, and so will be what it makes"]
    loaded = origin.get("weights")
    # without a file to start from, all of it was trained, its design too
    trained = loaded is None and "applied" not in origin
    if trained or (loaded is not None and loaded["format"] in TUNED and not loaded["new"]):
        return []
    starts = {spec.name: spec.traits().start for spec in plan.resolved.written}
    return [
        f"{name} needs tuning ({start.source}) and no tuned weights are loaded"
        for name, start in sorted(starts.items())
        if start.kind == "needs tuning"
    ]
