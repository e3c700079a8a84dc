"""Comparing two tensors by one scale-free number, with one table of tolerances and answers that must fail it.

The error ratio is the RMS of the difference over the RMS of the reference: 0 is equal, 1 is what zeros would score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest error ratio allowed for outputs and for gradients."""

    output: float
    gradient: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-9),
    torch.float32: Tolerance(5e-6, 2e-5),
    torch.bfloat16: Tolerance(2e-2, 4e-2),
    torch.float16: Tolerance(3e-3, 6e-3),
}
"""Against an fp64 reference that was given the same (rounded) weights and inputs."""


def error_ratio(got: Tensor, reference: Tensor) -> float:
    """RMS(got - reference) / RMS(reference), in fp64; inf when a value is not finite.

    A reference of zeros gives 0 for zeros and inf for anything else. Raises ValueError when the shapes differ.
    """
    if got.shape != reference.shape:
        raise ValueError(f"shapes differ: got {tuple(got.shape)}, reference {tuple(reference.shape)}")
    got, reference = got.detach().cpu().double(), reference.detach().cpu().double()
    if not bool(torch.isfinite(got).all()) or not bool(torch.isfinite(reference).all()):
        return float("inf")
    difference = float((got - reference).square().mean().sqrt()) if got.numel() else 0.0
    scale = float(reference.square().mean().sqrt()) if got.numel() else 0.0
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def assert_close(name: str, got: Tensor, reference: Tensor, ratio: float) -> None:
    """Fail with the measured error ratio when it exceeds `ratio`; `name` says what is compared."""
    measured = error_ratio(got, reference)
    if not measured <= ratio:
        raise AssertionError(
            f"{name}: error ratio {measured:.3g} exceeds {ratio:.3g} "
            f"(rms of the reference {float(reference.detach().double().square().mean().sqrt()):.3g})"
        )


def null_answers(reference: Tensor, *passed_through: Tensor) -> dict[str, Tensor]:
    """Wrong answers that every comparison must refuse: zeros, half the answer, the input where its shape allows."""
    answers = {"zeros": torch.zeros_like(reference), "half the answer": reference / 2}
    for i, x in enumerate(passed_through):
        if x.shape == reference.shape:
            answers[f"input {i} passed through"] = x.to(reference.dtype)
    return answers
