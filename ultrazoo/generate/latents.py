"""Latents on the disk before they are decoded: decoding is where memory runs out, and hours of sampling must not be lost.

The pipeline runs until it calls its VAE. That call is not made: its arguments are written to a file instead, and decoding
begins from the file, now or later (``--from-latents``).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UsageError, listed
from ..weights.disk import check_space, disk_errors, write_bytes
from ..weights.staging import staged_file

FORMAT = "ultrazoo latents 1"
FACTS = (
    *("pipeline", "vae", "recipe", "recipe_hash", "seed", "prompt", "negative_prompt"),
    *("width", "height", "frames", "steps", "guidance", "dtype"),
)
"""What latents say of themselves, all of it."""


class Sampled(Exception):
    """Sampling is done: the pipeline has come to its decoder."""


@dataclass(frozen=True)
class Latents:
    """Arguments of the decoders' calls as the pipeline made them: of the VAE, and of the audio VAE where there is one.

    `facts` say what was sampled: pipeline class, recipe hash, prompt, seed, size.
    """

    video: tuple[Any, ...]
    audio: tuple[Any, ...] | None
    facts: dict[str, Any]

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write a file that `load` reads; it appears whole or not at all. Raises OutputError."""
        tensors, plain = {}, {}
        for group, arguments in (("video", self.video), ("audio", self.audio or ())):
            for index, value in enumerate(arguments):
                name = f"{group}.{index}"
                if isinstance(value, Tensor):
                    tensors[name] = value.detach().cpu().contiguous()
                else:
                    plain[name] = value
        notes = {"format": FORMAT, "facts": json.dumps(self.facts), "plain": json.dumps(plain)}
        data = save(tensors, metadata=notes)
        place = Path(path)
        with staged_file(place, force=force) as new:
            with disk_errors(place):
                check_space(new.parent, len(data))
            write_bytes(new, data)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Latents:
        """Read a file that `save` wrote. Raises UsageError for any other file, or a damaged one."""
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be read as saved latents: {error}") from error
        if notes.get("format") != FORMAT:
            raise UsageError(f"{path} holds no latents of ultrazoo generate (format {notes.get('format')!r})")
        try:
            values: dict[str, Any] = {**tensors, **json.loads(notes["plain"])}
            facts = json.loads(notes["facts"])
            lacking = [key for key in FACTS if key not in facts]
            groups = {
                group: tuple(values[name] for name in sorted(values, key=_index) if name.startswith(f"{group}."))
                for group in ("video", "audio")
            }
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is damaged: its notes cannot be read ({error})") from error
        if lacking or not groups["video"] or not isinstance(groups["video"][0], Tensor):
            what = f"its notes lack {listed(lacking)}" if lacking else "it holds no latents of pictures"
            raise UsageError(f"{path} is damaged: {what}")
        return Latents(groups["video"], groups["audio"] or None, facts)


def _index(name: str) -> int:
    return int(name.rpartition(".")[2])


class Caught:
    """What the decoders of a pipeline were called with."""

    def __init__(self) -> None:
        self.video: tuple[Any, ...] | None = None
        self.audio: tuple[Any, ...] | None = None


@contextlib.contextmanager
def caught(pipeline: Any, audio: bool) -> Iterator[Caught]:
    """While it is open, the pipeline's decoders note their arguments and end the run with `Sampled`.

    With `audio` the video's decoder gives a black frame, so that the pipeline goes on to the audio's.
    """
    found = Caught()

    def decode(latents: Tensor, *rest: Any, **_: Any) -> Any:
        found.video = (latents, *rest)
        if not audio:
            raise Sampled
        frame = torch.zeros(latents.shape[0], 3, 1, 8, 8, device=latents.device, dtype=latents.dtype)
        return (frame,)

    def decode_audio(latents: Tensor, *rest: Any, **_: Any) -> Any:
        found.audio = (latents, *rest)
        raise Sampled

    parts = [(pipeline.vae, decode)]
    if audio:
        parts.append((pipeline.audio_vae, decode_audio))
    for part, instead in parts:
        vars(part)["decode"] = instead
    try:
        yield found
    finally:
        for part, _ in parts:
            vars(part).pop("decode", None)
