"""Every measure: what it needs, which way is better, its unit, and what it cannot see. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError, listed, near


@dataclass(frozen=True)
class Row:
    """Facts of one measure.

    `reference`: it compares a video with its reference. `network`: the role of the feature network that it runs, empty for
    none. `frames`: fewest frames; `side`: fewest pixels of width and of height. `better`: ``higher`` or ``lower``.
    """

    name: str
    better: str
    unit: str
    summary: str
    blind: str
    reference: bool = False
    network: str = ""
    frames: int = 1
    side: int = 1


ROWS = (
    Row(
        "psnr",
        "higher",
        "dB",
        "peak signal-to-noise ratio of the error of all frames together",
        "what the error looks like: a shift of one pixel costs more than a blurred face",
        reference=True,
    ),
    Row(
        "ssim",
        "higher",
        "-1..1",
        "structural similarity, Gaussian window of 11 x 11, mean over channels and frames",
        "anything between frames; colour is three separate channels",
        reference=True,
        side=11,
    ),
    Row(
        "lpips",
        "lower",
        "distance",
        "distance of deep features of frames (arXiv:1801.03924)",
        "anything between frames, and what its backbone was never trained on",
        reference=True,
        network="lpips",
        side=32,
    ),
    Row(
        "flicker",
        "lower",
        "levels of 255",
        "amplitude of the part of the luma that alternates from frame to frame",
        "whether it is flicker or fast fine motion; slow drifts are invisible",
        frames=3,
    ),
    Row(
        "consistency",
        "lower",
        "levels of 255",
        "luma that the previous frame cannot explain by moving blocks",
        "a frozen video is perfect to it; turning, new objects and motion beyond the search range count as errors",
        frames=2,
        side=32,
    ),
    Row(
        "feature_consistency",
        "higher",
        "-1..1",
        "cosine of the features of consecutive frames",
        "whatever its network ignores; a frozen video is perfect to it",
        network="frames",
        frames=2,
    ),
    Row(
        "hd_mse",
        "higher",
        "levels squared",
        "UltraGen's HD-MSE: error of a frame against itself made 8, 16, 32 times smaller and larger again",
        "what the high frequencies are: noise, ringing and aliasing score as well as detail",
        side=32,
    ),
    Row(
        "hd_lpips",
        "higher",
        "distance",
        "UltraGen's HD-LPIPS: as hd_mse, with the distance of lpips",
        "as hd_mse: any texture counts, wanted or not",
        network="lpips",
        side=32,
    ),
    Row(
        "hd_fvd",
        "lower",
        "squared distance",
        "UltraGen's HD-FVD: Frechet distance of the features of patches at native resolution",
        "anything wider than a patch, so the composition of a frame; biased upwards by few patches",
        reference=True,
        network="fvd",
    ),
)
NAMES = tuple(row.name for row in ROWS)


def row(name: str) -> Row:
    """The facts of a measure; raises UsageError with the near name for one that does not exist."""
    for one in ROWS:
        if one.name == name:
            return one
    hint = near(name, NAMES)
    raise UsageError(f"there is no measure {name!r}" + (f"; {hint}" if hint else "") + f"; known are {listed(NAMES)}")


def choose(
    asked: Sequence[str] | None, *, has_reference: bool, networks: Sequence[str]
) -> tuple[list[Row], dict[str, str]]:
    """The measures to compute, and for each measure that was left out the reason.

    `asked`: names, or None for all that can be computed. `networks`: roles for which there is a file. Raises UsageError
    when a measure asked for by name cannot be computed.
    """
    wanted = [row(name) for name in dict.fromkeys(asked)] if asked is not None else list(ROWS)
    if not wanted:
        raise UsageError(f"no measure is asked for; known are {listed(NAMES)}")
    reasons = {one.name: _lacking(one, has_reference, networks) for one in wanted}
    lacking = {name: reason for name, reason in reasons.items() if reason}
    if asked is not None and lacking:
        raise UsageError("; ".join(f"{name} {reason}" for name, reason in lacking.items()))
    return [one for one in wanted if one.name not in lacking], lacking


def _lacking(one: Row, has_reference: bool, networks: Sequence[str]) -> str:
    needs = []
    if one.reference and not has_reference:
        needs.append("a video to compare with (--reference)")
    if one.network and one.network not in networks:
        needs.append(f"the feature network {one.network!r} in the directory of --networks")
    return f"needs {' and '.join(needs)}" if needs else ""


PACKAGES = {"av": "PyAV reads the videos", "torchmetrics": "torchmetrics computes the measure ssim"}


def require(*packages: str) -> None:
    """Raise UsageError, with the line that installs them, when optional packages are absent."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        what = "; ".join(f"{name} is not installed ({PACKAGES[name]})" for name in absent)
        raise UsageError(f"{what}: pip install 'ultrazoo[evaluate]'")
