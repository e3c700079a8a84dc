"""SubBlock: how many blocks it keeps, what its score estimates, whose rows may be sparse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ultrazoo
from tests.attention.raw import block_of, given, noise, softmax
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.scene import Scene
from ultrazoo.attention.subblock import SubblockSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Segment, Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12


def site(*grid: int, **more: Any) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid), **more)


def composition(spec: SubblockSpec, at: Site) -> BlockSparseSpec:
    expanded = spec.expand(at)
    assert isinstance(expanded, BlockSparseSpec)
    return expanded


def scores_of(spec: SubblockSpec, q: torch.Tensor, k: torch.Tensor, key_valid: torch.Tensor | None = None) -> Any:
    """Scores of all blocks for q and k (B, N, heads, D)."""
    tokens, heads, dim = q.shape[1:]
    at = site(1, 1, tokens)
    module = block_of(spec, heads, dim, tokens)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    place = composition(spec, at).place(at)
    scene = Scene(place, q, k, k, q.new_zeros(q.shape[0], tokens, 1), key_valid)
    return module.selector.scores(scene, 0, place.queries.count)


@pytest.mark.parametrize(
    ("sparsity", "blocks", "kept"),
    [(0.75, 590, 152), (0.80, 590, 120), (0.85, 590, 96), (0.9, 590, 64), (0.75, 5, 5), (0.75, 1, 1), (0.0, 77, 77)],
)
def test_kept_blocks_are_rounded_up_to_eight(sparsity: float, blocks: int, kept: int) -> None:
    """152 of 590 blocks at sparsity 0.75, as published; never more than there are."""
    at = site(1, 1, 64 * blocks)
    assert SubblockSpec(sparsity=sparsity).cost(at).pairs == 64 * blocks * 64 * kept


def test_scores_cost_a_five_hundredth_of_dense() -> None:
    """N² D n_q n_k / 4096 multiply-adds, 0.2 % of 2 N² D at runs of 4 and 4."""
    at = site(1, 1, 64 * 600)
    assert SubblockSpec().cost(at).other_flops / (4 * at.tokens**2 * at.inner) == pytest.approx(16 / 4096 / 2, rel=1e-6)


def test_one_run_per_token_is_the_mass_of_the_block() -> None:
    q, k = noise(0, 2, 40, 2, 8, scale=2.0), noise(1, 2, 40, 2, 8, scale=2.0)
    found = scores_of(SubblockSpec(block=8, runs=(8, 8)), q, k)
    pairs = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
    mass = pairs.unflatten(-1, (5, 8)).unflatten(2, (5, 8)).permute(0, 1, 2, 4, 3, 5).flatten(4).logsumexp(-1)
    assert_close("log mass", found, mass, EXACT)


def test_one_run_per_block_is_the_plain_pooled_dot() -> None:
    q, k = noise(0, 1, 40, 1, 8), noise(1, 1, 40, 1, 8)
    found = scores_of(SubblockSpec(block=8, runs=(1, 1)), q, k)
    dots = torch.einsum("bihd,bjhd->bhij", q.unflatten(1, (5, 8)).mean(2), k.unflatten(1, (5, 8)).mean(2)) / 8**0.5
    assert_close("dots", found, dots, EXACT)


@pytest.mark.parametrize("tokens", [33, 34, 39])
def test_runs_without_a_token_are_left_out(tokens: int) -> None:
    """A short last block has fewer runs; an empty one would add exp(0)."""
    q, k = noise(0, 1, tokens, 1, 8), noise(1, 1, tokens, 1, 8)
    found = scores_of(SubblockSpec(block=8, runs=(4, 4)), q, k)
    last = [z[:, i : min(i + 2, tokens)].mean(1) for z in (q, k) for i in range(32, tokens, 2)]
    half = len(last) // 2
    dots = [(a * b).sum(-1) / 8**0.5 for a in last[:half] for b in last[half:]]
    assert_close("last block", found[0, :, -1, -1], torch.stack(dots).logsumexp(0)[0], EXACT)


def test_runs_of_invalid_keys_are_left_out() -> None:
    q, k = noise(0, 1, 16, 1, 8), noise(1, 1, 16, 1, 8)
    valid = torch.ones(1, 16, dtype=torch.bool)
    valid[0, 10:12] = False
    found = scores_of(SubblockSpec(block=8, runs=(1, 4)), q, k, valid)
    means = torch.stack([k[:, i : i + 2].mean(1) for i in (8, 12, 14)])
    expected = (q[:, :8].mean(1) * means).sum(-1).div(8**0.5).logsumexp(0)
    assert_close("block 1", found[0, 0, 0, 1:], expected[0], EXACT)


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 200])
def test_nothing_left_out_is_full_attention(tokens: int) -> None:
    q, k, v = (noise(tokens + i, 2, tokens, 2, 8, scale=2.0) for i in range(3))
    assert_close("sparsity 0", given(SubblockSpec(sparsity=0.0), q, k, v), softmax(q, k, v), EXACT)
    assert SubblockSpec(sparsity=0.0).traits().exact_at_init


def test_eight_blocks_or_fewer_are_full_attention() -> None:
    q, k, v = (noise(i, 1, 512, 1, 8, scale=2.0) for i in range(3))
    assert_close("8 blocks", given(SubblockSpec(), q, k, v), softmax(q, k, v), EXACT)
    assert error_ratio(given(SubblockSpec(multiple=1), q, k, v), softmax(q, k, v)) > 0.01


def test_finer_runs_keep_more_of_the_softmax() -> None:
    """Where the keys that matter are few in their block, runs find the block and its mean does not."""
    q, k, v = noise(0, 1, 1, 1, 16).expand(1, 512, -1, -1), noise(1, 1, 512, 1, 16), noise(2, 1, 512, 1, 16)
    # in every fourth block the first quarter points to the query and the rest away from it
    place = torch.arange(512)
    sign = torch.where(place % 16 < 4, 3.0, -1.0) * (place // 16 % 4 == 0)
    k = k + sign[None, :, None, None] * q
    full = softmax(q, k, v)
    coarse, fine = (
        error_ratio(given(SubblockSpec(block=16, multiple=1, runs=r), q, k, v), full) for r in ((1, 1), (4, 4))
    )
    assert fine < 0.3 * coarse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ties_go_to_the_first_blocks(dtype: torch.dtype) -> None:
    q = noise(0, 1, 64, 2, 8).to(dtype)
    k = noise(1, 1, 1, 2, 8).to(dtype).expand(1, 64, -1, -1)
    v = torch.arange(64.0).to(dtype)[None, :, None, None].expand(1, -1, 2, 8)
    module = block_of(SubblockSpec(block=8, multiple=1), 2, 8, 64).to(dtype)
    y = given(SubblockSpec(), q, k, v, module)
    assert_close("mean of the first two blocks", y, torch.full_like(y, 7.5), 1e-2)


def test_rows_that_are_no_video_stay_dense() -> None:
    """Whatever the host says of them: rows of several frames are sparse, all keys compete."""
    text = Segment("text", 5, rows="pattern")
    still = Segment("reference", 6, grid=Grid(1, 2, 3), rows="pattern", keys="compete")
    video = Segment("reference", 12, grid=Grid(2, 2, 3))
    at = site(2, 4, 4, extra=(text, still, video))
    spec = SubblockSpec(block=8)
    assert spec.problems(at) == []
    place = composition(spec, at).place(at)
    assert (place.queries.tokens, place.selectable, place.always_tokens) == (32 + 12, 4 + 1 + 1 + 2, 0)
    apart = composition(replace(spec, extra_keys="always"), at).place(at)
    assert (apart.queries.tokens, apart.selectable, apart.always_tokens) == (32 + 12, 4, 5 + 6 + 12)
    said = composition(replace(spec, extra_keys="host"), at).place(at)
    assert (said.selectable, said.always_tokens) == (4 + 1, 5 + 12)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"runs": [4]}, "runs"),
        ({"runs": [0, 4]}, "runs"),
        ({"runs": [4, 3]}, "runs"),
        ({"block": 0}, "block"),
        ({"block": 2}, "runs"),
    ],
    ids=str,
)
def test_bad_options_name_their_path(options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError, match=path):
        ultrazoo.create_attention("subblock", dim=16, heads=2, **options)


def test_samples_are_routed_apart() -> None:
    q, k, v = (noise(i, 3, 60, 2, 8, scale=2.0) for i in range(3))
    spec = SubblockSpec(block=4, multiple=1)
    module = block_of(spec, 2, 8, 60)
    together = given(spec, q, k, v, module)
    for i in range(3):
        alone = given(spec, q[i : i + 1], k[i : i + 1], v[i : i + 1], module)
        assert_close(f"sample {i}", alone, together[i : i + 1], EXACT)
