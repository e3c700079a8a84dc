"""From latents to pixels and sound, and into a file; only the decoders are needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UltrazooError
from . import media
from .families import Family
from .latents import Latents
from .wanted import Made, Wanted

KEPT = ("vae", "audio_vae", "vocoder")

Say = Callable[[str], None]


def forget(pipeline: Any) -> None:
    """Drop what decoding does not need: transformers and text encoders, and the hooks that offload them."""
    if hasattr(pipeline, "remove_all_hooks"):
        pipeline.remove_all_hooks()
    for name, part in list(vars(pipeline).items()):
        if isinstance(part, nn.Module) and name not in KEPT:
            setattr(pipeline, name, None)


def decode(
    pipeline: Any, family: Family, latents: Latents, wanted: Wanted, tiled: bool, sampling_s: float, say: Say
) -> Made:
    """Decode and write the output. Raises OutputError where it cannot be written, UltrazooError for infinite values."""
    start = time.perf_counter()
    device = torch.device(wanted.device)
    if tiled:
        pipeline.vae.enable_tiling()
    with torch.no_grad():
        decoded = through(pipeline.vae, latents.video, device)[0]
        if not torch.isfinite(decoded).all():
            raise UltrazooError(
                f"decoding in {str(decoded.dtype).removeprefix('torch.')} gave values that are not finite; decode again with "
                "--dtype float32"
            )
        frames = family.processor(pipeline, family.picked(decoded))
        audio = None if latents.audio is None else sound(pipeline, latents.audio, device)
    note = {key: value for key, value in latents.facts.items() if value is not None}
    if family.kind == "image":
        media.write_image(wanted.out, media.pixels(frames[0]), note, wanted.force)
    else:
        media.write_video(wanted.out, media.pixels(frames[0]), wanted.fps or family.fps, note, audio, wanted.force)
    say(f"written: {wanted.out}")
    return Made(wanted.out, wanted.saved, note, sampling_s, time.perf_counter() - start, tiled)


def through(part: nn.Module, arguments: tuple[Any, ...], device: torch.device) -> Any:
    """What a decoder makes of the arguments that the pipeline called it with, on `device` and in its own dtype."""
    part.to(device)
    kind = next(part.parameters()).dtype
    moved = [one.to(device, kind) if isinstance(one, torch.Tensor) else one for one in arguments]
    return part.decode(*moved, return_dict=False)  # type: ignore[operator]


def sound(pipeline: Any, arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, int]:
    """Samples (channels, n) in [-1, 1] and their rate."""
    heard = through(pipeline.audio_vae, arguments, device)[0]
    vocoder = getattr(pipeline, "vocoder", None)
    if vocoder is None:
        rate = pipeline.audio_vae.config.sampling_rate
        return heard.float().cpu().reshape(-1, heard.shape[-1]).numpy(), int(rate)
    samples = vocoder.to(device)(heard)
    return samples[0].float().cpu().numpy(), int(vocoder.config.output_sampling_rate)
