"""Evaluate videos: choose the measures, check every file before any work, stream each video once, collect.

Every video is decoded once, beside its reference; all measures see each frame as it passes. Memory is a few frames, and one
clip of frames for hd_fvd.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, listed
from . import networks as feature_networks
from .detail import Detail, squared
from .frechet import Patches, compare
from .motion import Consistency, FeatureConsistency, Flicker
from .networks import Network
from .pixels import Psnr, Ssim
from .table import Row, choose, require
from .video import Facts, frames, probe, together

PATCH_PX = 224
"""The side of the input of I3D."""
CLIP_FRAMES = 16
Progress = Callable[[int, int, Path], None]
"""Called before each video with its number from 0, how many there are, and its path."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    `videos`: one mapping per video, with its facts and ``measures``; a measure of a single video also holds the figure of its
    reference. `sets`: measures of all videos against all references. `left_out`: measure → why it was not computed.
    """

    videos: list[dict[str, Any]]
    sets: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    networks: dict[str, dict[str, str]]
    options: dict[str, Any]

    def data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": 1,
            "videos": self.videos,
            "sets": self.sets,
            "left_out": self.left_out,
            "networks": self.networks,
            "options": self.options,
        }


@dataclass
class _Tools:
    """Loaded networks and options that measures are made with."""

    networks: Mapping[str, Network]
    single: list[str] = field(default_factory=list)
    paired: list[str] = field(default_factory=list)

    def make(self, name: str) -> Any:
        """A fresh measure of a single video, or of a pair."""
        if name == "psnr":
            return Psnr()
        if name == "ssim":
            return Ssim()
        if name == "lpips":
            return _Mean(self.networks["lpips"])
        if name == "flicker":
            return Flicker()
        if name == "consistency":
            return Consistency()
        if name == "feature_consistency":
            return FeatureConsistency(self.networks["frames"])
        if name == "hd_mse":
            return Detail(squared)
        assert name == "hd_lpips", f"no measure is made for {name}"
        return Detail(_on_levels(self.networks["lpips"]))


class _Mean:
    """The mean over frames of a network's distance, and its worst frame."""

    def __init__(self, network: Network) -> None:
        self._distance = _on_levels(network)
        self._found: list[float] = []

    def update(self, frame: Tensor, reference: Tensor) -> None:
        self._found.append(float(self._distance(frame[None].float(), reference[None].float())))

    def result(self) -> dict[str, Any]:
        worst = max(range(len(self._found)), key=self._found.__getitem__)
        return {"value": sum(self._found) / len(self._found), "worst": self._found[worst], "worst_frame": worst}


def _on_levels(network: Network) -> Network:
    """The network with inputs on the scale 0..255 instead of [-1, 1]."""
    return lambda a, b: network(a / 127.5 - 1, b / 127.5 - 1)


def evaluate(
    videos: Sequence[str | os.PathLike[str]],
    references: Sequence[str | os.PathLike[str]] = (),
    *,
    metrics: Sequence[str] | None = None,
    networks: str | os.PathLike[str] | None = None,
    patch_px: int = PATCH_PX,
    clip_frames: int = CLIP_FRAMES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure videos, each against its reference: the n-th with the n-th, of the same size and length.

    `metrics`: names of `table.NAMES`; None means all for which there is a reference and a network, and the result says which
    were left out and why. `networks`: a directory of feature networks (see `networks`). `patch_px`, `clip_frames`: size and
    length of the clips of hd_fvd. Raises UsageError for files and options that do not serve, WeightsError for networks.
    """
    files = feature_networks.find(networks) if networks is not None else {}
    rows, left_out = choose(metrics, has_reference=bool(references), networks=tuple(files))
    _options(patch_px, clip_frames, device)
    require("av", *(["torchmetrics"] if any(row.name == "ssim" for row in rows) else []))
    pairs = _pairs([Path(v) for v in videos], [Path(r) for r in references])
    facts = _checked(pairs, rows, patch_px, clip_frames)
    used = {row.network: files[row.network] for row in rows if row.network}
    loaded = {role: feature_networks.load(role, file, device) for role, file in used.items()}
    names = [row.name for row in rows if row.name != "hd_fvd"]
    paired = [row.name for row in rows if row.reference]
    tools = _Tools(loaded, [n for n in names if n not in paired], [n for n in names if n in paired])
    clips = None
    if any(row.name == "hd_fvd" for row in rows):
        clips = [Patches(loaded["fvd"], patch_px=patch_px, clip_frames=clip_frames) for _ in range(2)]
    found = []
    for number, (video, reference) in enumerate(pairs):
        if progress is not None:
            progress(number, len(pairs), video)
        found.append(_one(facts[video], reference, tools, clips, device))
    return Evaluation(
        videos=found,
        sets={} if clips is None else {"hd_fvd": compare(*clips)},
        left_out=left_out,
        networks={role: {"file": str(file), "sha256": feature_networks.digest(file)} for role, file in used.items()},
        options={"patch_px": patch_px, "clip_frames": clip_frames} if clips is not None else {},
    )


def _one(
    facts: Facts, reference: Path | None, tools: _Tools, clips: list[Patches] | None, device: str
) -> dict[str, Any]:
    """Stream one video, beside its reference, through every measure."""
    own = {name: tools.make(name) for name in tools.single}
    theirs = {name: tools.make(name) for name in tools.single} if reference is not None else {}
    both = {name: tools.make(name) for name in tools.paired}
    count = 0
    if reference is None:
        for frame in frames(facts.path, device):
            count += 1
            _feed(own, frame)
    else:
        for frame, other in together(facts.path, reference, device):
            count += 1
            _feed(own, frame)
            _feed(theirs, other)
            _feed(both, frame, other)
            for patches, side in zip(clips or (), (frame, other), strict=False):
                patches.update(side)
        for patches in clips or ():
            patches.end()
    measures = {name: measure.result() for name, measure in {**both, **own}.items()}
    for name, measure in theirs.items():
        measures[name]["reference"] = measure.result()["value"]
    return {
        "video": str(facts.path),
        "reference": None if reference is None else str(reference),
        "width": facts.width,
        "height": facts.height,
        "frames": count,
        "fps": facts.fps,
        "measures": measures,
    }


def _feed(measures: Mapping[str, Any], *inputs: Tensor) -> None:
    with torch.inference_mode():
        for measure in measures.values():
            measure.update(*inputs)


def _options(patch_px: int, clip_frames: int, device: str) -> None:
    if patch_px < 1 or clip_frames < 1:
        raise UsageError(f"clips have 1 pixel and 1 frame or more, got {patch_px} pixels and {clip_frames} frames")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _pairs(videos: list[Path], references: list[Path]) -> list[tuple[Path, Path | None]]:
    if not videos:
        raise UsageError("evaluate needs a video")
    if not references:
        return [(video, None) for video in videos]
    if len(references) != len(videos):
        raise UsageError(
            f"{_counted(len(videos), 'video')}, {_counted(len(references), 'reference')}: the n-th is compared with the n-th, "
            "so give --reference once for each video"
        )
    return list(zip(videos, references, strict=True))


def _checked(
    pairs: Sequence[tuple[Path, Path | None]], rows: Sequence[Row], patch_px: int, clip_frames: int
) -> dict[Path, Facts]:
    """The headers of all files. Raises UsageError where sizes or counts differ, or are too small for a measure."""
    facts = {path: probe(path) for pair in pairs for path in pair if path is not None}
    fvd = any(row.name == "hd_fvd" for row in rows)
    for video, reference in pairs:
        mine = facts[video]
        _large_enough(mine, rows)
        if fvd and min(mine.width, mine.height) < patch_px:
            raise UsageError(
                f"{video} is {mine.size()}, smaller than the patches of hd_fvd, {patch_px} pixels (--patch)"
            )
        if fvd and mine.frames is not None and mine.frames < clip_frames:
            raise UsageError(f"{video} has {mine.frames} frames, the clips of hd_fvd have {clip_frames} (--clip)")
        if reference is None:
            continue
        other = facts[reference]
        if (mine.width, mine.height) != (other.width, other.height):
            raise UsageError(
                f"{video} is {mine.size()}, its reference {reference} is {other.size()}; both must have the same size"
            )
        if None not in (mine.frames, other.frames) and mine.frames != other.frames:
            raise UsageError(
                f"{video} has {mine.frames} frames, its reference {reference} has {other.frames}; both must have as many"
            )
    return facts


def _large_enough(facts: Facts, rows: Sequence[Row]) -> None:
    small = [row for row in rows if min(facts.width, facts.height) < row.side]
    if small:
        needs = listed(f"{row.name} needs {row.side}" for row in small)
        raise UsageError(f"{facts.path} is {facts.size()} pixels: {needs} per side; leave them out with --metrics")
    short = [row for row in rows if facts.frames is not None and facts.frames < row.frames]
    if short:
        needs = listed(f"{row.name} needs {row.frames}" for row in short)
        raise UsageError(
            f"{facts.path} has {_counted(facts.frames or 0, 'frame')}: {needs}; leave them out with --metrics"
        )
