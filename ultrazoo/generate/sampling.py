"""The denoising steps of one run: the recipe's attention goes in, the pipeline runs until it comes to its decoder."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import __version__, inplace
from ..errors import UltrazooError, UsageError
from ..recipe import Plan
from .families import Family, Request
from .latents import Latents, Sampled, caught


def place(pipeline: Any, device: torch.device, offload: bool) -> None:
    """Put the pipeline on `device`, or with `offload` each of its models only while it is at work."""
    if not offload:
        pipeline.to(device)
        return
    if not hasattr(pipeline, "enable_model_cpu_offload"):
        raise UsageError(f"{type(pipeline).__name__} has no way to offload its models; go without --offload")
    pipeline.enable_model_cpu_offload(device=device)


def cut_off(pipeline: Any, prompt: str) -> str | None:
    """What to say of a prompt that is longer than the pipeline reads; None where it is not, or nobody says how much.

    The words around it that some pipelines add are not counted.
    """
    row = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    limit = getattr(pipeline, "tokenizer_max_length", None) if row is None else row.default
    tokenizer = getattr(pipeline, "tokenizer", None)
    # a processor of pictures and words holds the tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(limit, int) or tokenizer is None:
        return None
    count = len(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    return f"the prompt has {count} tokens, of which this pipeline reads {limit}" if count > limit else None


def run(pipeline: Any, family: Family, request: Request, seed: int, bars: bool = False) -> None:
    """Call the pipeline; its transformers know at every forward which step it is. It may be ended by an exception.

    The noise is drawn on the CPU, so that a seed means the same on every device.
    """
    _show(pipeline, bars)
    if family.guider and request.guidance is not None:
        pipeline.guider = pipeline.guider.new(guidance_scale=request.guidance)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), stepping(pipeline, request.steps):
        pipeline(**family.arguments(request), generator=generator)


def sample(pipeline: Any, family: Family, request: Request, seed: int, bars: bool) -> Latents:
    """Run the pipeline up to its decoder.

    `facts` of what comes back hold the request. Raises UsageError where the pipeline never comes to its VAE, UltrazooError
    for values that are not finite.
    """
    with caught(pipeline, family.audio) as found, contextlib.suppress(Sampled):
        run(pipeline, family, request, seed, bars)
    if found.video is None:
        raise UsageError(
            f"{type(pipeline).__name__} ended without calling its VAE: its call differs from what generate knows"
        )
    if not torch.isfinite(found.video[0]).all():
        raise UltrazooError(
            "sampling ended in values that are not finite, which nothing can decode; with --dtype float16 try bfloat16"
        )
    facts = {
        "seed": seed,
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


def _show(part: Any, bars: bool) -> None:
    """Show or hide the progress bars of a pipeline, and of all blocks within its blocks where it is a modular one."""
    if hasattr(part, "set_progress_bar_config"):
        part.set_progress_bar_config(disable=not bars)
    for block in getattr(getattr(part, "_blocks", part), "sub_blocks", {}).values():
        _show(block, bars)


def facts_of(plan: Plan, name: str, vae: str) -> dict[str, Any]:
    """What latents and files say about the model: pipeline class `name`, recipe, and the digest `vae` of its settings."""
    return {
        "ultrazoo": __version__,
        "pipeline": name,
        "vae": vae,
        "recipe": plan.name,
        "recipe_hash": plan.hash,
    }


@contextlib.contextmanager
def stepping(pipeline: Any, steps: int) -> Iterator[None]:
    """Tell the models before each forward at which of `steps` they are, by the scheduler's own count."""
    scheduler = pipeline.scheduler

    def tell(model: nn.Module, *_: Any) -> None:
        session: Any = model.session
        # a scheduler that evaluates twice per step counts both
        count = max(len(scheduler.timesteps), 1)
        index = scheduler.step_index or 0
        session.select(min(index * steps // count, steps - 1), steps, session.branch)

    found: list[Any] = [getattr(pipeline, name, None) for name in inplace.COMPONENTS]
    models = [model for model in found if hasattr(model, "session")]
    handles = [model.register_forward_pre_hook(tell, prepend=True) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for model in models:
            model.session.deselect()
            model.session.reset_state()
