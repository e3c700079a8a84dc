"""What a run needs before it starts: weights, the transformer's activations, decoding; and what the device has.

Estimates. Weights: numbers in the files times the dtype's bytes. Transformer: the plan's inference activations, for as many
samples as one forward holds. Text encoders are counted by their weights. Decoding: four full-resolution activations of the
decoder's widest layer there, of all frames or of the four that a causal VAE has in flight, or of one tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import inplace
from ..errors import UsageError
from ..weights.disk import human
from .decoding import KEPT
from .families import Family, Request

TRANSFORMERS = inplace.COMPONENTS
ACTIVATIONS = 4
CAUSAL_FRAMES = 4
TILE_PX = 256
TILE_FRAMES = 16


@dataclass(frozen=True)
class Estimate:
    """Bytes of one run, stage by stage; `free` is what the device has for it, None where that is not known.

    `transformer`, `decode` and `decode_tiled` are activations. `offloaded`: one component at a time is on the device, beside
    those that `stay` there.
    """

    weights: Mapping[str, int]
    transformer: int
    decode: int
    decode_tiled: int
    free: int | None
    offloaded: bool = False
    stay: tuple[str, ...] = ()

    @property
    def held(self) -> int:
        """Weights of all components together."""
        return sum(self.weights.values())

    @property
    def sampling(self) -> int:
        if not self.offloaded:
            return self.held + self.transformer
        staying = sum(size for name, size in self.weights.items() if name in self.stay)
        needs = [
            (0 if name in self.stay else size) + (self.transformer if name in TRANSFORMERS else 0)
            for name, size in self.weights.items()
        ]
        return staying + max(needs, default=0)

    @property
    def decoders(self) -> int:
        """Weights that are left when decoding begins."""
        return sum(size for name, size in self.weights.items() if name in KEPT)

    def lines(self) -> list[str]:
        parts = ", ".join(f"{name} {human(size)}" for name, size in self.weights.items())
        weights = "weights of one component at a time" if self.offloaded else "weights"
        return [
            f"weights {human(self.held)} ({parts})",
            f"sampling {human(self.sampling)}: {weights} and {human(self.transformer)} of activations",
            f"decoding {human(self.decoders + self.decode)}, in tiles {human(self.decoders + self.decode_tiled)}",
            f"free {human(self.free)}" if self.free is not None else "free memory is not known on this device",
        ]


def estimate(
    elements: Mapping[str, int],
    size: int,
    activations: int,
    family: Family,
    request: Request,
    device: torch.device,
    offloaded: bool = False,
    stay: tuple[str, ...] = (),
) -> Estimate:
    """Estimate a run: `elements` of weights per component in `size` bytes each, `activations` bytes of one forward; `stay`
    names components that are not offloaded."""
    frames = request.frames if family.frames_at_once else min(request.frames, CAUSAL_FRAMES)
    pixel = ACTIVATIONS * family.channels * size
    whole = pixel * frames * request.width * request.height
    tile = pixel * min(frames, TILE_FRAMES) * min(request.width, TILE_PX) * min(request.height, TILE_PX)
    # the finished frames, fp32, and once more as they are written
    output = 2 * 12 * request.frames * request.width * request.height
    weights = {name: count * size for name, count in elements.items()}
    return Estimate(weights, activations, whole + output, tile + output, free_bytes(device), offloaded, stay)


def tiling(found: Estimate, wanted: str) -> tuple[bool, str]:
    """Whether to decode in tiles, and why. `wanted`: ``auto``, ``on``, ``off``. Raises UsageError when it cannot fit."""
    if found.free is None:
        return wanted == "on", "asked for" if wanted == "on" else ""
    if found.sampling > found.free:
        raise UsageError(
            f"this run needs about {human(found.sampling)} to sample and {human(found.free)} are free: "
            f"{'; '.join(found.lines())}; use a smaller size, fewer frames, a 16-bit --dtype{'' if found.offloaded else ' or, on a GPU, --offload'}"
        )
    whole, tiled = found.decoders + found.decode, found.decoders + found.decode_tiled
    if wanted == "off" or (wanted == "auto" and whole <= found.free):
        if whole > found.free:
            raise UsageError(
                f"decoding in one piece needs about {human(whole)} and {human(found.free)} are free; drop --tile off"
            )
        return False, ""
    if tiled > found.free:
        raise UsageError(f"decoding needs about {human(tiled)} even in tiles, and {human(found.free)} are free")
    why = "asked for" if wanted == "on" else f"in one piece it would need {human(whole)} of {human(found.free)} free"
    return True, why


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run may take on `device`; None where it cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    return int(rows["MemAvailable"].split()[0]) * 1024
