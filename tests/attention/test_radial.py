"""Radial attention: published densities of its block map, its map against loops, and sizes it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.radial import block_map
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.orders import Place
from ultrazoo.attention.parts.radial import RadialMapSpec
from ultrazoo.attention.radial import RadialSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import Site


def site(*grid: int) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid))


def expanded(spec: RadialSpec, at: Site) -> BlockSparseSpec:
    found = spec.expand(at)
    assert isinstance(found, BlockSparseSpec)
    return found


@pytest.mark.parametrize(
    ("frames", "size", "decay", "sink", "density"),
    [(18, 3840, 0.2, 1, 0.287), (18, 3840, 1.0, 1, 0.431), (21, 3600, 0.2, 1, 0.262), (30, 3840, 0.95, 0, 0.275)],
)
def test_published_densities(frames: int, size: int, decay: float, sink: int, density: float) -> None:
    at = site(frames, 48, size // 48)
    pairs = RadialSpec(decay=decay, sink=sink).cost(at).pairs
    assert abs(pairs / at.tokens**2 - density) < 0.0006


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((5, 5, 7), {"block": 6, "width": 6, "decay": 0.2, "sink": 1}),
        ((9, 4, 5), {"block": 7, "width": 5, "decay": 0.1, "sink": 1}),
        ((6, 3, 5), {"block": 15, "width": 4, "decay": 0.5, "sink": 0}),
        ((17, 4, 4), {"block": 5, "width": 2, "decay": 0.05, "sink": 2}),
    ],
    ids=str,
)
def test_the_map_equals_loops_and_leaves_no_row_empty(grid: tuple[int, int, int], options: dict[str, float]) -> None:
    at = site(*grid)
    spec = expanded(RadialSpec(**options), at)  # type: ignore[arg-type]
    place = spec.place(at)
    found = spec.selector.map(place, at, 0, place.queries.count)[0]
    assert (found == np.array(block_map(grid, options))).all()
    assert found.any(1).all()
    assert not found.all()


def test_random_maps_equal_loops_from_any_row_to_any_other() -> None:
    rng = np.random.default_rng(0)
    partial = 0
    for _ in range(40):
        grid = Grid(*(int(n) for n in rng.integers((2, 1, 2), (9, 5, 7))))
        block, width = (int(n) for n in rng.integers(1, grid.h * grid.w + 1, 2))
        options = {"decay": float(rng.choice([0.05, 0.2, 0.6, 1.5])), "block": block, "width": width}
        options["sink"] = int(rng.integers(0, 3))
        spec = expanded(RadialSpec(**options), site(*grid))  # type: ignore[arg-type]
        place = spec.place(site(*grid))
        lo = int(rng.integers(0, place.queries.count))
        wanted = np.array(block_map(tuple(grid), options))[lo:]
        assert (spec.selector.map(place, site(*grid), lo, place.queries.count)[0] == wanted).all(), (grid, options)
        partial += not wanted.all()
    assert partial > 20


def test_an_image_is_full_attention() -> None:
    at = site(1, 16, 24)
    assert RadialSpec().cost(at).pairs == at.tokens**2


def test_blocks_larger_than_a_frame_are_refused() -> None:
    (problem,) = RadialSpec(block=128).problems(site(4, 8, 8))
    assert problem.path == "block"
    assert "64" in str(problem.fix)
    assert RadialSpec(block=64).problems(site(4, 8, 8)) == []


def test_a_plan_makes_the_map_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = RadialMapSpec.map

    def counted(spec: RadialMapSpec, place: Place, at: Site, lo: int, hi: int) -> np.ndarray:
        made.append((lo, hi))
        return plain(spec, place, at, lo, hi)

    monkeypatch.setattr(RadialMapSpec, "map", counted)
    # a decay that no other test asks for, so that nothing is known yet
    costs = [RadialSpec(decay=0.2125).cost(site(6, 16, 24).at(layer=layer, layers=30)) for layer in range(30)]
    assert len({cost.pairs for cost in costs}) == 1
    assert len(made) == 1
