"""FLUX.2 and Z-Image: which rows are the target, and what these adapters refuse."""

from __future__ import annotations

import pytest
import torch

import ultrazoo
from tests.backbones.adapters.test_parity import recipe, run
from tests.backbones.adapters.tiny import TINY, arguments, made
from ultrazoo.backbones.diffusers.flux2 import image_ids, target_grid
from ultrazoo.errors import UsageError
from ultrazoo.grid import Grid

FLUX2, Z = "Flux2Transformer2DModel", "ZImageTransformer2DModel"


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 7), (1, 5, 1), (1, 5, 7)])
def test_the_target_is_read_from_ids(grid):
    ids = torch.cat([image_ids(Grid(*grid)) + torch.tensor([0, 3, 5, 0]), image_ids(Grid(1, 2, 3), 10)])
    for each in (ids, ids.expand(2, -1, -1)):
        found, (_, h, w) = target_grid(each)
        assert found == grid
        assert h.tolist() == list(range(3, 3 + grid[1]))
        assert w.tolist() == list(range(5, 5 + grid[2]))


@pytest.mark.parametrize(
    "ids",
    [
        torch.cat([image_ids(Grid(1, 2, 3), 10), image_ids(Grid(1, 4, 6))]),
        image_ids(Grid(1, 4, 6)).flip(0).roll(1, 0),
        image_ids(Grid(1, 4, 6))[:-1],
        image_ids(Grid(1, 4, 6), 10),
    ],
    ids=["references first", "another order", "half a row", "no target"],
)
def test_rows_that_are_no_target_are_refused(ids):
    with pytest.raises(UsageError, match="img_ids must begin with the target's rows"):
        target_grid(ids)


@pytest.mark.parametrize("more", [{"kv_cache_mode": "extract"}, {"kv_cache": object()}], ids=" ".join)
def test_cached_references_are_refused(more):
    model = made(FLUX2)
    ultrazoo.apply(model, recipe(FLUX2, "full"))
    with pytest.raises(UsageError, match="kv_cache"):
        model(**arguments(FLUX2, "references", TINY[FLUX2].grids[0]), **more)


def test_images_of_several_sizes_and_of_several_parts_are_refused():
    model = made(Z)
    ultrazoo.apply(model, recipe(Z, "full"))
    given = arguments(Z, "plain", TINY[Z].grids[0])
    other = arguments(Z, "plain", TINY[Z].grids[1])
    with pytest.raises(UsageError, match="one batch holds images of sizes"):
        run(model, {**given, "x": [given["x"][0], other["x"][0]]})
    with pytest.raises(UsageError, match="the omni mode"):
        run(model, {**given, "x": [[image] for image in given["x"]]})
