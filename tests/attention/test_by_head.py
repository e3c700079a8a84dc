"""Head groups promise what all of their groups can keep, and their cost counts what each group counts."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.linear import LinearSpec
from ultrazoo.attention.monarch import MonarchSpec
from ultrazoo.attention.parts.orders import RasterSpec
from ultrazoo.attention.parts.pooled import PooledSpec
from ultrazoo.attention.parts.rules import MeanStdSpec, TopKSpec
from ultrazoo.attention.sla2 import Sla2Spec
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Site, Traits

SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(2, 4, 5))
LEARNED = PooledSpec(rule=TopKSpec(share=0.4), project=True)
SPARSE = BlockSparseSpec(order=RasterSpec(block=4), selector=LEARNED)
GROUPS: dict[str, AttentionSpec] = {
    "full": FullSpec(),
    "linear": LinearSpec(),
    "sparse": SPARSE,
    "monarch": MonarchSpec(h_reduce=2),
    "sla2": Sla2Spec(block=(4, 4)),
}


def pair(one: AttentionSpec, two: AttentionSpec) -> ByHeadSpec:
    return ByHeadSpec(groups={"0-1": one, "2": two})


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_one_group_that_cannot_speaks_for_all(name: str, first: bool) -> None:
    """Beside full attention, which promises everything, head groups promise what the other group does."""
    other = GROUPS[name]
    both = (other, FullSpec()) if first else (FullSpec(), other)
    found, alone = pair(*both).traits(), other.traits()
    for trait in (
        "softmax",
        "fullgraph",
        "selects",
        "export",
        "visible",
        "exact_at_init",
        "extra",
        "key_valid",
        "needs",
    ):
        assert getattr(found, trait) == getattr(alone, trait), trait
    assert found.notes == "; ".join(note for note in {alone.notes, FullSpec().traits().notes} if note)
    assert found.frozen == tuple(f"groups.{0 if first else 1}.{one}" for one in alone.frozen)


def test_every_trait_follows_the_groups() -> None:
    """A trait that is added to `Traits` must be thought of here as well."""
    found = {field.name for field in fields(Traits)}
    followed = {"start", "needs", "exact_at_init", "export", "visible", "extra", "key_valid", "min_grid", "selects"}
    assert found == followed | {"softmax", "fullgraph", "frozen", "notes"}


def test_two_groups_with_the_same_limits_say_so_once() -> None:
    assert pair(SPARSE, SPARSE).traits().notes == SPARSE.traits().notes
    both = pair(SPARSE, LinearSpec()).traits().notes
    assert SPARSE.traits().notes in both
    assert LinearSpec().traits().notes in both


@pytest.mark.parametrize("name", ["sparse", "sla2"])
def test_frozen_names_are_parameters_without_gradients(name: str) -> None:
    spec = pair(FullSpec(), GROUPS[name])
    module = spec.expand(SITE).build(SITE)
    frozen = {one for one, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert frozen == set(spec.traits().frozen) == set(spec.expand(SITE).traits().frozen)


def test_the_fewest_pairs_of_a_group_may_be_none() -> None:
    """A rule that may keep no block: 0 is a number, not a missing one."""
    none = BlockSparseSpec(order=RasterSpec(block=4), selector=PooledSpec(rule=MeanStdSpec(tau=1.0)))
    alone = none.cost(SITE.at(heads=2, host_heads=3))
    assert alone.pairs_min == 0
    cost = pair(none, FullSpec()).cost(SITE)
    assert cost.pairs_min == round(40 * 40 / 3)
    assert cost.pairs_max == 40 * 40
