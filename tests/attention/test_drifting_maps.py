"""Maps that are kept until queries and keys have moved (HASTE, arXiv 2605.14513): distances, votes, samples, what is not real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.test_block_sparse_steps import (
    EXACT,
    HEADS,
    SIZE,
    TOKENS,
    TOP,
    Clip,
    inputs,
    spec_of,
    under_the_map_of,
)
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.cached import CachedSpec
from ultrazoo.testing import assert_close, error_ratio


def moved(qkv: tuple[Tensor, Tensor, Tensor], *distances: float) -> tuple[Tensor, Tensor, Tensor]:
    """Other queries and keys of every head, whose means lie at these distances (L1, half in q and half in k) of `qkv`'s."""
    other = inputs(77, batch=qkv[0].shape[0])
    found = []
    for z, new in zip(qkv[:2], other[:2], strict=True):
        new = new - new.mean(1, keepdim=True) + z.mean(1, keepdim=True)
        step = torch.tensor(distances, dtype=z.dtype)[:, None].expand(HEADS, SIZE) / (2 * SIZE)
        found.append(new + step * torch.tensor([1.0, -1.0] * (SIZE // 2), dtype=z.dtype))
    return found[0], found[1], other[2]


def drifting(votes: tuple[float, float] = (0.0, 1.0), **more: Any) -> BlockSparseSpec:
    return spec_of(CachedSpec(of=TOP, drift=8.0, votes=votes, **more))


def test_a_head_gets_a_new_map_when_its_means_have_moved() -> None:
    """Distances to the step of the last map, not to the step before: 5 and 5 more are 10."""
    spec, start = drifting(), inputs(0)
    clip = Clip(spec)
    clip(start, 0)
    first = moved(start, 5.0, 9.0, 0.0)
    found = clip(first, 1)
    old, new = under_the_map_of(spec, start, first), under_the_map_of(spec, first, first)
    for head, due in enumerate((old, new, old)):
        assert_close(f"head {head}", found[:, :, head], due[:, :, head], EXACT)
        assert error_ratio(old[:, :, head], new[:, :, head]) > 0.1
    second = moved(start, 10.0, 9.0, 7.9)
    found = clip(second, 2)
    made_at = (second, first, start)
    for head, made in enumerate(made_at):
        due = under_the_map_of(spec, made, second)
        assert_close(f"head {head}", found[:, :, head], due[:, :, head], EXACT)


@pytest.mark.parametrize(
    ("votes", "asking", "renewed"),
    [
        ((0.4, 0.8), (1,), ()),
        ((0.4, 0.8), (0, 2), (0, 2)),
        ((0.4, 0.8), (0, 1, 2), (0, 1, 2)),
        ((0.1, 0.5), (0, 2), (0, 1, 2)),
        ((0.1, 0.5), (), ()),
    ],
)
def test_heads_of_a_layer_vote(votes: tuple[float, float], asking: tuple[int, ...], renewed: tuple[int, ...]) -> None:
    spec, start = drifting(votes), inputs(0)
    clip = Clip(spec)
    clip(start, 0)
    now = moved(start, *(9.0 if head in asking else 1.0 for head in range(HEADS)))
    found = clip(now, 1)
    for head in range(HEADS):
        due = under_the_map_of(spec, now if head in renewed else start, now)
        assert_close(f"head {head}", found[:, :, head], due[:, :, head], EXACT)


def test_samples_drift_apart_from_each_other() -> None:
    spec, start = drifting((0.4, 0.8)), inputs(0, batch=2)
    clip, singles = Clip(spec), [Clip(spec), Clip(spec)]
    now = moved(start, 9.0, 9.0, 9.0)
    still = tuple(torch.cat([a[:1], b[1:]]) for a, b in zip(moved(start, 1.0, 1.0, 1.0), now, strict=True))
    for step, qkv in enumerate((start, still)):
        found = clip(qkv, step)  # type: ignore[arg-type]
        for i, one in enumerate(singles):
            alone = one(tuple(z[i : i + 1] for z in qkv), step)  # type: ignore[arg-type]
            assert_close(f"sample {i}", found[i : i + 1], alone, EXACT)


def test_drift_alone_has_no_period_and_both_have() -> None:
    start, still = inputs(0), moved(inputs(0), 0.0, 0.0, 0.0)
    for more, made in (({}, start), ({"every": 4}, still)):
        spec = drifting(**more)
        clip = Clip(spec)
        clip(start, 0)
        assert_close("step 40", clip(still, 40), under_the_map_of(spec, made, still), EXACT)
    assert (CachedSpec(of=TOP).period, CachedSpec(of=TOP, drift=1.0).period) == (12, None)


def test_what_is_not_real_moves_nothing() -> None:
    spec, start = drifting((0.0, 1.0)), inputs(0)
    valid = torch.arange(TOKENS)[None] < 30
    clip = Clip(spec)
    first = clip(start, 0, key_valid=valid)
    wild = tuple(torch.where(valid[..., None, None], z, z + 100.0) for z in start)
    assert_close("valid rows", clip(wild, 1, key_valid=valid)[valid], first[valid], EXACT)  # type: ignore[arg-type]
    kept = next(iter(clip.state.values()))  # type: ignore[union-attr]
    means = torch.cat([z[:, :30].mean(1) for z in start[:2]], dim=-1)
    assert_close("means", kept.middle, means, EXACT)
