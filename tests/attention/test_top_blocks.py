"""VSA, NABLA and SpargeAttention2: what they expand to, their shares, the switches that make them exact, sizes they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ultrazoo
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.nabla import NablaSpec
from ultrazoo.attention.sparge2 import Sparge2Spec
from ultrazoo.attention.video_sparse import VideoSparseSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import error_ratio


def site(*grid: int) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid))


def test_vsa_visits_the_published_share() -> None:
    """Wan at (21, 45, 80): 6 x 12 x 20 = 1 440 cubes, many partial; 10 % of them are visited."""
    at = site(21, 45, 80)
    spec = VideoSparseSpec(sparsity=0.9, gate="none")
    expanded = spec.expand(at)
    assert isinstance(expanded, BlockSparseSpec)
    assert expanded.place(at).keys.count == 1440
    cost = spec.cost(at)
    assert abs(cost.pairs / at.tokens**2 - 0.1) < 1e-6
    assert cost.pairs_min is not None
    assert cost.pairs_max is not None
    # partial cubes may be chosen everywhere or nowhere
    assert cost.pairs_min < cost.pairs < cost.pairs_max


def test_vsa_counts_its_gate_and_its_coarse_attention() -> None:
    at = site(8, 16, 16)
    fine, both = VideoSparseSpec(gate="none").cost(at), VideoSparseSpec().cost(at)
    assert both.parameters - fine.parameters == (at.dim + 1) * at.inner
    assert both.pairs - fine.pairs == 32 * 32


def test_images_use_their_own_tile() -> None:
    expanded = VideoSparseSpec().expand(site(1, 32, 48))
    assert isinstance(expanded, BlockSparseSpec)
    assert expanded.place(site(1, 32, 48)).tile == (1, 8, 8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("video_sparse", {"tile": [2, 2, 2], "sparsity": 0.0}),
        ("nabla", {"tile": [1, 2, 2], "p": 1.0, "window": None}),
        ("sparge2", {"share": 1.0, "block": [8, 8]}),
    ],
)
def test_keeping_everything_is_full_attention(name: str, options: dict[str, object]) -> None:
    block = ultrazoo.create_attention(name, dim=16, heads=2, **options)
    full = ultrazoo.create_attention("full", dim=16, heads=2)
    full.load_state_dict(block.state_dict(), strict=False)
    x = torch.randn(2, 3 * 5 * 4, 16)
    with torch.no_grad():
        assert error_ratio(block(x, (3, 5, 4)), full(x, (3, 5, 4))) < 1e-5


@pytest.mark.parametrize(
    ("spec", "exact"),
    [
        (NablaSpec(tile=(1, 2, 2), p=1.0, window=None), True),
        (NablaSpec(tile=(1, 2, 2), p=0.9, window=None), False),
        (Sparge2Spec(share=1.0), True),
        (Sparge2Spec(), False),
    ],
)
def test_all_blocks_are_an_exact_start(spec: Any, exact: bool) -> None:
    traits = spec.traits()
    assert (traits.exact_at_init, traits.start.kind == "exact") == (exact, exact)


def test_even_windows_are_refused_with_the_legal_ones() -> None:
    (problem,) = NablaSpec(tile=(1, 2, 2), window=(1, 2, 3)).problems(site(3, 10, 10))
    assert problem.path == "window"
    assert all(str(legal) in str(problem.fix) for legal in (1, 3, 5))


@pytest.mark.parametrize(
    ("name", "options", "path"),
    [
        ("video_sparse", {"sparsity": 1.0}, "sparsity"),
        ("video_sparse", {"tile": [4, 4]}, "tile"),
        ("sparge2", {"share": 0.0}, "share"),
        ("sparge2", {"block": [128, 64, 32]}, "block"),
        ("nabla", {"p": 1.5}, "p"),
    ],
)
def test_bad_options_name_their_path(name: str, options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError) as caught:
        ultrazoo.create_attention(name, dim=16, heads=2, **options)
    assert path in str(caught.value)


def test_ties_go_to_the_first_block() -> None:
    """Equal keys give equal scores: a block that comes first is kept, at any batch and head."""
    at = site(1, 4, 8)
    expanded = Sparge2Spec(share=0.25, p=0.01, block=(8, 8)).expand(at)
    assert isinstance(expanded, BlockSparseSpec)
    rule = expanded.selector.rule  # type: ignore[attr-defined]
    scores = torch.zeros(2, 3, 4, 4)
    scene = SimpleNamespace(keeps=(None,), key_valid=None, place=SimpleNamespace(selectable=4, extra_selectable=0))
    kept = rule.choose(scores, scene, 0)
    assert kept[..., 0].all()
    assert not kept[..., 1:].any()
