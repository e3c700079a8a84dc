"""Compressed branches that are lifted frame by frame as they are fused, beside the lift of all frames at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.parts import fuse
from ultrazoo.attention.parts.compressors import AvgPoolSpec, DepthwiseConvSpec, LiftModule, Unlifted
from ultrazoo.attention.parts.layouts import WindowsSpec
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import error_ratio

GRID = Grid(4, 7, 10)
SITE = Site(dim=24, heads=3, head_dim=8, grid=GRID)
BRANCHES = {
    "local": BranchSpec(layout=WindowsSpec(counts=(1, 2, 2))),
    "regional": BranchSpec(compress=DepthwiseConvSpec(factor=2)),
    "coarse": BranchSpec(compress=AvgPoolSpec(factor=(1, 4, 3), lift="nearest")),
    "frames": BranchSpec(compress=DepthwiseConvSpec(factor=(2, 2, 2))),
}
ORDERS: dict[str, Any] = {
    "the first": ("regional", "local"),
    "the second": ("local", "regional"),
    "both": ("regional", "coarse"),
    "nested": ("coarse", ("local", "regional")),
    "a pair of pairs": (("coarse", "regional"), ("local", "frames")),
}


def made(order: Any, branches: dict[str, BranchSpec]) -> Standalone:
    used = {name: branches[name] for name in dict.fromkeys(fuse.leaves_of(order))}
    held = Standalone(BranchedSpec(branches=used, fuse=fuse.TimeGateSpec(order=order)), SITE)
    reset_parameters(held)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in held.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return held


@pytest.mark.parametrize("per_frame", [False, True], ids=["a time per sample", "a time per frame"])
@pytest.mark.parametrize("order", list(ORDERS))
def test_frame_by_frame_is_all_at_once(order: str, per_frame: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = made(ORDERS[order], BRANCHES)
    x = torch.randn(2, GRID.tokens, SITE.dim)
    time = (
        torch.tensor([[100.0, 300.0, 500.0, 900.0], [50.0, 60.0, 70.0, 80.0]])
        if per_frame
        else torch.tensor([9.0, 700.0])
    )
    lifted = []
    frames = Unlifted.frames
    monkeypatch.setattr(Unlifted, "frames", lambda self: lifted.append(self) or frames(self))
    with torch.no_grad():
        found = held(x, tuple(GRID), time)
    assert lifted
    lifted.clear()
    expected = held(x, tuple(GRID), time)
    assert not lifted
    assert error_ratio(found, expected) < 1e-6


def test_an_output_that_two_gates_weigh_stays_as_it_is() -> None:
    twin = {**BRANCHES, "twin": BRANCHES["local"]}
    held = made((("local", "regional"), ("twin", "coarse")), twin)
    x, time = torch.randn(1, GRID.tokens, SITE.dim), torch.tensor([400.0])
    with torch.no_grad():
        found = held(x, tuple(GRID), time)
    assert error_ratio(found, held(x, tuple(GRID), time)) < 1e-6


def test_other_fusions_get_whole_outputs() -> None:
    spec = BranchedSpec(branches={name: BRANCHES[name] for name in ("local", "regional")}, fuse=fuse.WeightsSpec())
    held = Standalone(spec, SITE)
    reset_parameters(held)
    x = torch.randn(1, GRID.tokens, SITE.dim)
    with torch.no_grad():
        found = held(x, tuple(GRID))
    assert error_ratio(found, held(x, tuple(GRID))) < 1e-6


def test_lifting_late_plans_less() -> None:
    """A branch of cells of one frame waits at its cells, one that spans frames is lifted at once."""
    peaks = {}
    for name in ("regional", "frames"):
        branches = {"local": BRANCHES["local"], name: BRANCHES[name]}
        for kind in (fuse.TimeGateSpec(order=("local", name)), fuse.WeightsSpec()):
            peaks[name, kind.name] = BranchedSpec(branches=branches, fuse=kind).cost(SITE).peak_elements
    cells = 4 * 4 * 5
    saved = (GRID.tokens - cells) * SITE.inner
    assert peaks["regional", "weights"] - peaks["regional", "time_gate"] == saved
    assert peaks["frames", "weights"] == peaks["frames", "time_gate"]


@pytest.mark.parametrize("spec", [BRANCHES["regional"].compress, BRANCHES["coarse"].compress], ids=["conv", "nearest"])
def test_frames_of_a_lift(spec: Any) -> None:
    lift = LiftModule(spec, SITE)
    with torch.no_grad():
        for parameter in lift.parameters():
            parameter.normal_()
        y = torch.randn(2, 4, *(-(-n // f) for n, f in zip(GRID[1:], spec.cell[1:], strict=True)), SITE.inner)
        whole = Unlifted(lift, y, tuple(GRID)).whole()
        for sample, frame, tokens in Unlifted(lift, y, tuple(GRID)).frames():
            assert error_ratio(tokens, whole[sample, frame]) < 1e-6
