"""Initial values and their seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ultrazoo.ops import init
from ultrazoo.ops.seeds import generator_for


def test_a_seed_depends_on_seed_and_name_alone() -> None:
    draw = [torch.rand(3, generator=generator_for(*key)) for key in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        (init.Constant(0.25), (2, 2), [[0.25, 0.25], [0.25, 0.25]]),
        (init.Values((1.0, 3.0)), (4,), [1.0, 1.0, 3.0, 3.0]),
        (init.Values((1.0, 3.0)), (2,), [1.0, 3.0]),
    ],
)
def test_stated_values(value: init.Value, shape: tuple[int, ...], expected: list[object]) -> None:
    assert init.make(value, shape, torch.Generator()).tolist() == expected


def test_centre_passes_its_input() -> None:
    weight = init.make(init.Centre(), (4, 1, 3, 3, 3), torch.Generator())
    x = torch.randn(1, 4, 3, 5, 6)
    assert torch.equal(nn.functional.conv3d(x, weight, padding=1, groups=4), x)


def test_linear_starts_as_torch_starts_it() -> None:
    linear = nn.Linear(64, 32)
    weight = init.initial_tensor(linear, "weight", (32, 64), torch.Generator().manual_seed(0))
    assert weight.abs().max() <= 1 / math.sqrt(64)
    assert math.isclose(weight.std().item(), 1 / math.sqrt(3 * 64), rel_tol=0.05)


def test_a_module_that_does_not_say_is_an_error() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match="'scale'"):
        init.value_of(Silent(), "scale")
