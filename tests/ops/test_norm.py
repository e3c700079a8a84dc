"""RMS norm and time embedding against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ultrazoo.ops.embed import sinusoid
from ultrazoo.ops.norm import rms_norm
from ultrazoo.testing import error_ratio


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_rms_norm(dtype: torch.dtype, scale: float) -> None:
    x = (scale * torch.randn(2, 5, 48)).to(dtype)
    weight = torch.randn(48).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert error_ratio(rms_norm(x, weight, 1e-6), expected) < limit
    assert error_ratio(rms_norm(x, None, 1e-6), expected / weight.double()) < limit


def test_sinusoid_is_cosines_then_sines() -> None:
    found = sinusoid(torch.tensor([0.0, 250.5]), 8, torch.float64)
    for row, t in zip(found, (0.0, 250.5), strict=True):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_an_integer_timestep_keeps_its_embedding() -> None:
    assert torch.equal(sinusoid(torch.tensor([7]), 8, torch.float32), sinusoid(torch.tensor([7.0]), 8, torch.float32))
