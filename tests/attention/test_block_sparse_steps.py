"""Block-sparse attention over denoising steps: budgets per step and head, maps that are kept, and when they are made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ultrazoo
from tests.attention.raw import GivenHost, noise, softmax
from tests.attention.test_block_sparse_core import case_of, expected
from tests.oracles.block_sparse import Tokens, block_sparse, chosen_blocks, token_mask
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.contract import Call, Extra
from ultrazoo.attention.parts.budgets import BudgetSpec
from ultrazoo.attention.parts.cached import CachedSpec
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import TopKOrPSpec, TopKSpec, TopPSpec
from ultrazoo.attention.parts.selectors import BandSpec, UnionSpec
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.spec import Segment, Site
from ultrazoo.testing import assert_close, attend, error_ratio, scores
from ultrazoo.testing.scenario import randomise

GRID = (2, 4, 5)
TOKENS, HEADS, SIZE = 40, 3, 8
EXACT = 1e-11
TOP = PooledSpec(rule=TopKSpec(share=0.3))


def spec_of(selector: Any) -> BlockSparseSpec:
    return BlockSparseSpec(order=RasterSpec(block=4), selector=selector)


def inputs(seed: int, batch: int = 1, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (noise(10 * seed + i, batch, tokens, HEADS, SIZE, scale=2.0) for i in range(3))
    return q, k, v


class Clip:
    """A module called step after step with one state, as a model does."""

    def __init__(self, spec: Any, state: dict[Any, Any] | None = None):
        self.spec = spec
        self.module = spec.build(Site(dim=HEADS * SIZE, heads=HEADS, head_dim=SIZE, grid=Grid(*GRID))).double()
        self.state: dict[Any, Any] | None = {} if state is None else state

    def __call__(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        step: int | None,
        branch: str | None = None,
        grid: tuple[int, int, int] = GRID,
        **more: Any,
    ) -> Tensor:
        x = torch.cat([z.flatten(2) for z in qkv], dim=-1)
        at = None if step is None else (step, 50)
        call = Call(grid=grid, step=at, branch=branch, state=self.state, **more)
        with torch.no_grad():
            found = self.module(x, GivenHost(HEADS), call)
        found = found[0] if isinstance(found, tuple) else found
        return found.unflatten(-1, (HEADS, -1))  # type: ignore[no-any-return]


def under_the_map_of(spec: Any, made: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> Tensor:
    """Attention of `now` over the blocks that `made` would choose."""
    where, chosen = chosen_blocks(case_of(spec, *made, grid=GRID))
    tokens = Tokens.of(case_of(spec, *now, grid=GRID))
    mask = token_mask(where, chosen, TOKENS)
    return attend(scores(tokens.q, tokens.k, mask), tokens.v).unflatten(-1, (HEADS, -1))


# --- budgets ----------------------------------------------------------------------------------------------------------

SCHEDULE = {"0-3": 1.0, "4,8-9": 0.5, "10-49": 0.1}


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (3, 1.0), (4, 0.5), (5, 0.3), (9, 0.5), (10, 0.1), (49, 0.1)])
def test_each_step_has_its_share(step: int, share: float) -> None:
    """A step that is not listed keeps the inner selector's own share."""
    spec = spec_of(BudgetSpec(of=TOP, steps=SCHEDULE))
    qkv = inputs(0)
    with record() as runs:
        found = Clip(spec)(qkv, step)
    blocks = TOKENS // 4
    assert runs[0].pairs == HEADS * TOKENS * 4 * round(share * blocks)
    reference = block_sparse(case_of(spec, *qkv, grid=GRID), step)
    assert isinstance(reference, Tensor)
    assert_close(f"step {step}", found.flatten(2), reference, EXACT)
    assert_close(
        "the share alone", found, expected(spec_of(PooledSpec(rule=TopKSpec(share=share))), *qkv, grid=GRID), EXACT
    )


def test_no_word_of_the_step_is_dense() -> None:
    qkv = inputs(0)
    for selector in (
        BudgetSpec(of=TOP, steps={"0-49": 0.1}),
        BudgetSpec(of=TOP, heads=(0.1, 0.1, 0.1), steps={"0-49": 0.1}),
        CachedSpec(of=BudgetSpec(of=TOP, steps={"0-49": 0.1})),
    ):
        assert_close("dense", Clip(spec_of(selector))(qkv, None), softmax(*qkv), EXACT)
        assert error_ratio(Clip(spec_of(selector))(qkv, 0), softmax(*qkv)) > 0.1


def test_a_step_s_share_is_every_head_s() -> None:
    shares = (0.1, 0.3, 0.7)
    spec = spec_of(BudgetSpec(of=TOP, heads=shares, steps={"0-1": 0.5}))
    qkv = inputs(0)
    for step, expected_shares in ((0, (0.5,) * 3), (2, shares)):
        with record() as runs:
            found = Clip(spec)(qkv, step)
        assert runs[0].pairs == TOKENS * 4 * sum(round(10 * share) for share in expected_shares)
        reference = block_sparse(case_of(spec, *qkv, grid=GRID), step)
        assert isinstance(reference, Tensor)
        assert_close(f"step {step}", found.flatten(2), reference, EXACT)


def test_a_budget_of_top_k_or_top_p_changes_the_k() -> None:
    inner = PooledSpec(rule=TopKOrPSpec(share=0.1, p=0.01))
    spec = spec_of(BudgetSpec(of=inner, heads=(0.1, 0.5, 1.0)))
    qkv = inputs(0)
    with record() as runs:
        found = Clip(spec)(qkv, None)
    assert runs[0].pairs == TOKENS * 4 * (1 + 5 + 10)
    assert_close("heads", found, expected(spec, *qkv, grid=GRID), EXACT)


def test_a_budget_of_top_p_changes_the_mass() -> None:
    """A head with mass p keeps what top-p keeps at p, and a head with 1 everything."""
    shares = (0.2, 0.6, 1.0)
    spec = spec_of(BudgetSpec(of=PooledSpec(rule=TopPSpec(p=0.9)), heads=shares))
    qkv = inputs(0, batch=2)
    found = Clip(spec)(qkv, None)
    for head, share in enumerate(shares):
        alone = expected(spec_of(PooledSpec(rule=TopPSpec(p=share))), *qkv, grid=GRID)
        assert_close(f"head {head}", found[:, :, head], alone[:, :, head], EXACT)
    with record() as runs:
        Clip(spec_of(BudgetSpec(of=PooledSpec(rule=TopPSpec(p=0.9)), steps={"0-4": 0.1})))(qkv, 3)
    with record() as own:
        Clip(spec_of(PooledSpec(rule=TopPSpec(p=0.1))))(qkv, 3)
    assert runs[0].pairs == own[0].pairs


@pytest.mark.parametrize("around", ["union", "cached", "both"])
def test_a_budget_reaches_through_what_is_around_a_selector(around: str) -> None:
    band = BandSpec(width=0)
    wrapped: dict[str, Any] = {
        "union": UnionSpec(of=(TOP, band)),
        "cached": CachedSpec(of=TOP),
        "both": CachedSpec(of=UnionSpec(of=(band, TOP))),
    }
    spec = spec_of(BudgetSpec(of=wrapped[around], heads=(0.1, 0.4, 1.0)))
    site = Site(dim=24, heads=HEADS, head_dim=SIZE, grid=Grid(*GRID))
    assert spec.problems(site) == []
    qkv = inputs(0)
    found = Clip(spec)(qkv, 0)
    for head, share in enumerate((0.1, 0.4, 1.0)):
        top = PooledSpec(rule=TopKSpec(share=share))
        alone: Any = top if around == "cached" else UnionSpec(of=(top, band))
        reference = expected(spec_of(alone), *qkv, grid=GRID)
        assert_close(f"head {head}", found[:, :, head], reference[:, :, head], EXACT)
    if around == "cached":
        assert spec.cost(site).pairs == TOKENS * 4 * 5


def test_a_new_share_makes_a_kept_map_anew() -> None:
    spec = spec_of(BudgetSpec(of=CachedSpec(of=TOP, every=50), steps={"0-1": 0.5, "2-3": 0.2}))
    clip = Clip(spec)
    for step, (made, share) in enumerate([(0, 0.5), (0, 0.5), (2, 0.2), (2, 0.2), (4, 0.3), (4, 0.3)]):
        due = under_the_map_of(spec_of(PooledSpec(rule=TopKSpec(share=share))), inputs(made), inputs(step))
        assert_close(f"step {step}", clip(inputs(step), step), due, EXACT)


def test_a_kept_map_of_a_budget_is_made_anew_where_the_share_is_another() -> None:
    """Steps 0-1 are dense, 2-4 keep one map, 5 has another share, 6 the selector's own and a map of its own."""
    budget = BudgetSpec(of=TOP, steps={"0-1": 1.0, "2-4": 0.5, "5": 0.2})
    for of in (budget, UnionSpec(of=(budget, BandSpec(width=0))), CachedSpec(of=budget, every=40)):
        clip = Clip(spec_of(CachedSpec(of=of, every=30)))
        for step, (made, share) in enumerate(
            [(0, 1.0), (0, 1.0), (2, 0.5), (2, 0.5), (2, 0.5), (5, 0.2), (6, 0.3), (6, 0.3)]
        ):
            top: Any = PooledSpec(rule=TopKSpec(share=share))
            alone = UnionSpec(of=(top, BandSpec(width=0))) if isinstance(of, UnionSpec) else top
            due = under_the_map_of(spec_of(alone), inputs(made), inputs(step))
            assert_close(f"step {step}", clip(inputs(step), step), due, EXACT)


def test_a_plan_prices_the_sparse_steps_and_bounds_the_dense_ones() -> None:
    site = Site(dim=24, heads=HEADS, head_dim=SIZE, grid=Grid(*GRID))
    cost = spec_of(BudgetSpec(of=TOP, steps=SCHEDULE)).cost(site)
    assert (cost.pairs_min, cost.pairs, cost.pairs_max) == (TOKENS * 4, TOKENS * 4 * 3, TOKENS**2)
    heads = spec_of(BudgetSpec(of=TOP, heads=(0.1, 0.3, 0.8))).cost(site)
    assert heads.pairs == TOKENS * 4 * 4


def test_a_plan_that_knows_the_steps_prices_their_mean() -> None:
    """Two dense steps, three of half the ten blocks, five of the selector's own three: the published way of giving a density."""
    site = Site(dim=24, heads=HEADS, head_dim=SIZE, grid=Grid(*GRID), steps=10)
    cost = spec_of(BudgetSpec(of=TOP, steps={"0-1": 1.0, "2,4-5": 0.5})).cost(site)
    assert cost.pairs == TOKENS * 4 * (2 * 10 + 3 * 5 + 5 * 3) // 10
    assert (cost.pairs_min, cost.pairs_max) == (TOKENS * 4 * 3, TOKENS**2)
    dense = spec_of(BudgetSpec(of=TOP, steps={"0-9": 1.0})).cost(site)
    assert (dense.pairs_min, dense.pairs) == (TOKENS**2, TOKENS**2)


def test_a_budget_keeps_everything_if_every_share_does() -> None:
    ones = (1.0,) * HEADS
    assert BudgetSpec(of=TOP, heads=ones).keeps_all()
    assert BudgetSpec(of=TOP, heads=ones, steps={"0-3": 1.0}).keeps_all()
    assert not BudgetSpec(of=TOP, heads=ones, steps={"0-3": 0.1}).keeps_all()
    assert not BudgetSpec(of=TOP, steps={"0-3": 1.0}).keeps_all()


# --- kept maps --------------------------------------------------------------------------------------------------------

CACHED = spec_of(CachedSpec(of=TOP, every=3))


def test_a_map_is_kept_for_some_steps_and_made_anew() -> None:
    """Made at steps 0, 3, 6; in between the queries and keys of the step run under the map of another."""
    clip = Clip(CACHED)
    for step in range(8):
        found = clip(inputs(step), step)
        assert_close(f"step {step}", found, under_the_map_of(CACHED, inputs(step - step % 3), inputs(step)), EXACT)
        if step % 3:
            assert error_ratio(found, expected(CACHED, *inputs(step), grid=GRID)) > 0.1


def test_a_run_that_starts_late_makes_its_map_when_it_first_runs() -> None:
    clip = Clip(CACHED)
    clip(inputs(4), 4)
    assert_close("step 5", clip(inputs(5), 5), under_the_map_of(CACHED, inputs(4), inputs(5)), EXACT)


@pytest.mark.parametrize("missing", ["state", "step"])
def test_without_state_or_step_every_call_makes_its_own(missing: str) -> None:
    clip = Clip(CACHED)
    if missing == "state":
        clip.state = None
    for step in range(3):
        found = clip(inputs(step), None if missing == "step" else step)
        assert_close(f"call {step}", found, expected(CACHED, *inputs(step), grid=GRID), EXACT)
    assert not clip.state


def test_guidance_branches_keep_maps_of_their_own() -> None:
    clip = Clip(CACHED)
    clip(inputs(0), 0, "cond")
    clip(inputs(1), 0, "uncond")
    assert_close("cond", clip(inputs(2), 1, "cond"), under_the_map_of(CACHED, inputs(0), inputs(2)), EXACT)
    assert_close("uncond", clip(inputs(3), 1, "uncond"), under_the_map_of(CACHED, inputs(1), inputs(3)), EXACT)


def test_layers_keep_maps_of_their_own() -> None:
    state: dict[Any, Any] = {}
    first, second = Clip(CACHED, state), Clip(CACHED, state)
    first(inputs(0), 0)
    second(inputs(1), 0)
    assert_close("first", first(inputs(2), 1), under_the_map_of(CACHED, inputs(0), inputs(2)), EXACT)
    assert_close("second", second(inputs(3), 1), under_the_map_of(CACHED, inputs(1), inputs(3)), EXACT)


def test_an_earlier_step_starts_anew() -> None:
    clip = Clip(CACHED)
    for step in range(2):
        clip(inputs(step), step)
    assert_close("step 0 again", clip(inputs(5), 0), expected(CACHED, *inputs(5), grid=GRID), EXACT)


def test_another_size_starts_anew() -> None:
    """Another grid with as many blocks, another batch: nothing of the old map is used."""
    clip = Clip(CACHED)
    clip(inputs(0), 0)
    for grid in ((4, 2, 5), (1, 5, 7)):
        tokens = grid[0] * grid[1] * grid[2]
        qkv = inputs(1, tokens=tokens)
        assert_close(f"at {grid}", clip(qkv, 1, grid=grid), expected(CACHED, *qkv, grid=grid), EXACT)
    qkv = inputs(2, batch=2)
    assert_close("batch 2", clip(qkv, 1), expected(CACHED, *qkv, grid=GRID), EXACT)


def test_other_extra_tokens_start_anew() -> None:
    """Keys that compete are columns of the map: a longer text has more."""
    clip = Clip(CACHED)

    def text(length: int) -> dict[str, Any]:
        q, k, v = (noise(90 + i, 1, length, HEADS, SIZE) for i in range(3))
        return {"extra": Extra(q, k, v, segments=(Segment("text", length, keys="compete"),))}

    qkv = inputs(0)
    clip(qkv, 0, **text(3))
    found = clip(qkv, 1, **text(9))
    fresh = Clip(spec_of(TOP))(qkv, None, **text(9))
    assert_close("a longer text", found, fresh, EXACT)


def test_selectors_of_one_layer_keep_maps_of_their_own() -> None:
    """Two in a union, one in each head group: they share a state, not a map."""
    one, two = CachedSpec(of=TOP, every=3), CachedSpec(of=PooledSpec(rule=TopKSpec(share=0.2), runs=(2, 2)), every=3)
    united, inner = UnionSpec(of=(one, two)), UnionSpec(of=(one.of, two.of))
    clip = Clip(spec_of(united))
    for step in range(3):
        found = clip(inputs(step), step)
        assert_close(f"step {step}", found, under_the_map_of(spec_of(inner), inputs(0), inputs(step)), EXACT)

    groups = {"0": spec_of(one), "1": spec_of(two), "2": spec_of(one)}
    clip = Clip(ByHeadSpec(groups=groups))
    for step in range(3):
        found = clip(inputs(step), step)
        for head, spec in enumerate(groups.values()):
            reference = under_the_map_of(spec, inputs(0), inputs(step))[:, :, head]
            assert_close(f"head {head} at step {step}", found[:, :, head], reference, EXACT)


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    recipe = {
        "schema": 1,
        "name": "kept",
        "video": {"grid": [2, 4, 5]},
        "sampling": {"steps": 6},
        "backbone": {"name": "wan", "dim": 24, "layers": 2, "heads": 2, "ffn_dim": 32, "text_dim": 8, "text_tokens": 4},
        "attention": {
            "*": {
                "name": "block_sparse",
                "order": {"name": "raster", "block": 4},
                "selector": {
                    "name": "cached",
                    "every": 2,
                    "of": {"name": "budget", "of": "pooled", "steps": {"0": 1.0}},
                },
            }
        },
        "dtype": "float32",
    }
    built = ultrazoo.build(recipe).eval()
    # a fresh model answers zeros
    randomise(built)
    return built


def test_a_model_keeps_maps_per_layer_and_branch_and_drops_them(model: Any) -> None:
    latents, text = noise(0, 1, 16, 2, 8, 10).float(), noise(1, 1, 4, 8).float()
    moved = latents + noise(2, 1, 16, 2, 8, 10).float()
    time = torch.tensor([500.0])
    with torch.no_grad():
        model.select(2, 6, "cond")
        model(latents, time, text)
        model.select(3, 6, "cond")
        kept = model(moved, time, text)
        model.select(3, 6, "uncond")
        fresh = model(moved, time, text)
        model.reset_state()
        model.select(3, 6, "cond")
        after = model(moved, time, text)
        model.deselect()
        dense = model(moved, time, text)
        model.select(0, 6, "cond")
        first = model(moved, time, text)
    assert torch.equal(after, fresh), "a reset forgets every map"
    assert error_ratio(kept, fresh) > 1e-6, "step 3 uses the map of step 2"
    assert_close("no step", dense, first, 1e-6)
    assert error_ratio(fresh, dense) > 1e-6


def test_a_model_in_training_keeps_nothing(model: Any) -> None:
    latents, text = noise(0, 1, 16, 2, 8, 10).float(), noise(1, 1, 4, 8).float()
    model.select(2, 6)
    model(latents, torch.tensor([500.0]), text).sum().backward()
    assert not model.session.state


def test_replaced_specs_are_others() -> None:
    """Specs with steps can be compared and hashed: plans are cached by them."""
    one = spec_of(BudgetSpec(of=TOP, steps=SCHEDULE))
    assert one == replace(one)
    assert one != spec_of(BudgetSpec(of=TOP, steps={"0-3": 1.0}))
    site = Site(dim=24, heads=HEADS, head_dim=SIZE, grid=Grid(*GRID))
    assert one.cost(site) == one.cost(site)
