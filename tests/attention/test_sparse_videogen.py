"""Sparse VideoGen: the band's width, the head types that it tells apart, and images."""

from __future__ import annotations

import math

import pytest
import torch

import ultrazoo
from ultrazoo.attention.sparse_videogen import SparseVideoGenSpec
from ultrazoo.grid import Grid
from ultrazoo.ops.blocks import even_blocks
from ultrazoo.spec import Segment, Site
from ultrazoo.testing import error_ratio


def test_the_band_holds_the_density_asked_for() -> None:
    """Without the sink, and up to the blocks that the band's edge cuts: 1 - (1 - w/N)^2."""
    grid = Grid(21, 45, 80)
    spec = SparseVideoGenSpec(density=0.3, sink=0)
    share = spec.pairs(grid) / grid.tokens**2
    assert 0.3 <= share < 0.31
    width = grid.tokens * (1 - math.sqrt(0.7))
    assert spec.band(grid) == math.ceil(width / 128)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("sink", [0, 1, 3])
def test_pairs_are_those_of_the_map(density: float, sink: int) -> None:
    """Block by block: the band alone, a sink that it reaches into or stands apart from, and one larger than the grid."""
    for grid, block in ((Grid(6, 5, 7), 8), (Grid(2, 3, 5), 4), (Grid(1, 4, 5), 6), (Grid(9, 2, 2), 1)):
        spec = SparseVideoGenSpec(density=density, sink=sink, block=block)
        blocks = even_blocks(grid.tokens, block)
        pairs = 0
        for row in range(blocks.count):
            for column in range(blocks.count):
                if abs(row - column) <= spec.band(grid) or column * block < sink * grid.h * grid.w:
                    pairs += int(blocks.sizes[row] * blocks.sizes[column])
        assert spec.pairs(grid) == pairs


def test_heads_of_frames_and_of_places_are_told_apart() -> None:
    """Keys that mark the frame make a head spatial, keys that mark the place make it temporal."""
    grid = Grid(8, 6, 6)
    spec = SparseVideoGenSpec(density=0.2, block=4, sink=0, rows=64)
    module = spec.build(Site(dim=16, heads=2, head_dim=64, grid=grid))
    frame = torch.arange(grid.tokens) // 36
    place = torch.arange(grid.tokens) % 36
    marks = torch.stack([torch.nn.functional.one_hot(one, 64).float() for one in (frame, place)])[None] * 12
    values = torch.randn(1, 2, grid.tokens, 64)
    order = torch.arange(grid.tokens).view(8, 36).T.reshape(-1)
    chosen = module._choose(marks, marks, values, None, grid, even_blocks(grid.tokens, 4), order)
    assert chosen.tolist() == [[False, True]]


def test_an_image_and_a_density_of_one_are_full_attention() -> None:
    full = ultrazoo.create_attention("full", dim=16, heads=2)
    for grid, options in (((1, 5, 7), {"density": 1.0}), ((3, 5, 7), {"density": 1.0, "block": 8})):
        block = ultrazoo.create_attention("sparse_videogen", dim=16, heads=2, **options)
        full.load_state_dict(block.state_dict())
        x = torch.randn(2, math.prod(grid), 16)
        with torch.no_grad():
            assert error_ratio(block(x, grid), full(x, grid)) < 1e-5


def test_a_call_repeats() -> None:
    block = ultrazoo.create_attention("sparse_videogen", dim=16, heads=2, block=8, rows=5)
    x = torch.randn(1, 105, 16)
    with torch.no_grad():
        assert torch.equal(block(x, (3, 5, 7)), block(x, (3, 5, 7)))


@pytest.mark.parametrize(
    ("kernel", "block", "grid", "extra", "words"),
    [
        ("by_key", 8, (1, 16, 16), 0, "is for blocks of one query, they have up to 8"),
        ("by_key", 1, (1, 4, 4), 0, ""),
        ("flash_attn_4", 64, (1, 16, 16), 0, "takes query blocks of 128 tokens alone, these are of 64"),
        ("flash_attn_4", 128, (1, 16, 18), 0, "the last of these is of 32: 128 does not divide 288"),
        ("flash_attn_4", 128, (1, 16, 16), 0, ""),
        ("flash_attn_4", 128, (1, 16, 16), 7, "takes key blocks of 128 tokens alone, the last of these is of 7"),
        ("gathered", 8, (1, 16, 17), 7, ""),
    ],
)
def test_a_kernel_for_other_blocks_is_refused(
    kernel: str, block: int, grid: tuple[int, int, int], extra: int, words: str
) -> None:
    segments = (Segment("text", extra),) if extra else ()
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(*grid), extra=segments)
    found = SparseVideoGenSpec(block=block, kernel=kernel).problems(site)
    assert [problem.path for problem in found] == ["kernel"] * bool(words)
    assert all(words in problem.rule for problem in found)
