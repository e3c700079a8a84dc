"""Rotary embedding against complex arithmetic in fp64."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from ultrazoo.attention.contract import Positions, grid_positions
from ultrazoo.grid import Grid
from ultrazoo.ops import rope
from ultrazoo.spec import Rope
from ultrazoo.testing import error_ratio


def turned(z: Tensor, positions: Positions, spec: Rope) -> Tensor:
    """z (B, n, heads, D) turned pair by pair with Python's complex numbers."""
    out = z.double().clone()
    used = sum(spec.axes)
    angles: list[tuple[int, float]] = []
    for axis, channels in enumerate(spec.axes):
        angles += [(axis, spec.base ** (-2 * i / channels)) for i in range(channels // 2)]
    places = [(t, y, x) for t in positions.t.tolist() for y in positions.h.tolist() for x in positions.w.tolist()]
    for n, place in enumerate(places):
        for pair, (axis, frequency) in enumerate(angles):
            a, b = (2 * pair, 2 * pair + 1) if spec.pairing == "interleaved" else (pair, pair + used // 2)
            turn = cmath.exp(1j * place[axis] * frequency)
            real, imag = z[:, n, :, a].double(), z[:, n, :, b].double()
            out[:, n, :, a] = real * turn.real - imag * turn.imag
            out[:, n, :, b] = real * turn.imag + imag * turn.real
    return out


@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
@pytest.mark.parametrize("axes", [(4, 4, 4), (2, 4, 4), (4, 6, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotation_turns_pairs(pairing: str, axes: tuple[int, int, int], dtype: torch.dtype) -> None:
    spec = Rope(axes=axes, pairing=pairing)
    positions = Positions(torch.arange(2.0), torch.tensor([0.0, 0.5, 7.0]), torch.tensor([3.0, 0.0, 1.5, 40.0]))
    z = torch.randn(2, 24, 3, 12).to(dtype)
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    expected = turned(z, positions, spec)
    assert error_ratio(rope.rotate(z, positions, spec), expected) < limit
    traced = rope._rotate_traced(z, rope.tables(positions, spec), spec)
    assert error_ratio(traced, expected) < limit
    # the comparison must notice an unrotated answer
    assert error_ratio(z, expected) > 0.1


def test_gradient_is_the_opposite_rotation() -> None:
    spec = Rope(axes=(2, 2, 2))
    positions = grid_positions((2, 2, 3))
    z = torch.randn(1, 12, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope.rotate(x, positions, spec), (z,))


@pytest.mark.parametrize("width", [7, 300])
def test_chunks_of_rows_are_one_rotation(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Rope(axes=(4, 2, 2))
    positions = grid_positions((2, 5, width))
    z = torch.randn(1, 10 * width, 2, 8)
    whole = rope.rotate(z, positions, spec)
    monkeypatch.setattr(rope, "TABLE_BYTES", 1)
    assert torch.equal(rope.rotate(z, positions, spec), whole)


def test_tables_of_the_4k_grid_are_kilobytes() -> None:
    grid = Grid(21, 136, 240)
    found = rope.tables(grid_positions(grid), Rope(axes=(44, 42, 42)))
    assert [tuple(table.angles.shape) for table in found] == [(21, 22), (136, 21), (240, 21)]
    assert sum(table.angles.numel() * table.angles.element_size() for table in found) < 100_000


def test_rules_stretch_only_beyond_the_trained_size() -> None:
    positions = torch.arange(3.0)

    def unit(rule: str, length: int) -> Tensor:
        """Angles of position 1."""
        return rope.axis_table(positions, 8, 100.0, rule=rule, trained=32, length=length).angles[1]

    plain = unit("none", 64)
    for rule in ("interpolate", "ntk", "yarn"):
        assert torch.equal(unit(rule, 32), plain)
        assert torch.equal(unit(rule, 20), plain)
    assert error_ratio(unit("interpolate", 64), plain / 2) < 1e-12
    ntk = unit("ntk", 64)
    assert ntk[0] == 1
    assert math.isclose(ntk[-1].item(), (100 * 2 ** (8 / 6)) ** -0.75)
    yarn = rope.axis_table(positions, 8, 100.0, rule="yarn", trained=32, length=64)
    # the lowest frequency turns 32/(2π·31.6) < 1 times over the trained length: it is interpolated
    assert math.isclose(yarn.angles[1, -1].item(), plain[-1].item() / 2)
    assert plain[0] / 2 < yarn.angles[1, 0] < plain[0]
    assert yarn.magnitude is not None
    assert math.isclose(yarn.magnitude.item(), 0.1 * math.log(2) + 1)
