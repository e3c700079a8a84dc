"""What a caller asks of a run, and what the run made. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for; None leaves it to the recipe, then to the pipeline.

    `offload`: only the model that is at work is on the GPU. `seed` None means 0, and any seed of saved latents.
    `engines`: exported files that take the place of the transformer, one, or one for each phase of a step schedule.
    """

    prompt: str
    out: Path
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    fps: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    tile: str = "auto"
    latents: Path | None = None
    force: bool = False
    offload: bool = False
    engines: tuple[Path, ...] = ()

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
