"""Slots of a model and what goes into them: seeds by name, shared tensors, copies of the host's weights."""

from __future__ import annotations

import hashlib
import threading
import weakref

import pytest
import torch
from torch import nn

from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.adapt import OwnSpec
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.errors import UltrazooError
from ultrazoo.grid import Grid
from ultrazoo.ops.init import Constant, Normal
from ultrazoo.weights.slots import Unfilled, Values, attention_paths, seeded, slots_of, stream

SPEC = WanSpec(dim=24, layers=2, heads=2, ffn_dim=40, channels=4, text_dim=16, time_dim=32)
OWN = BranchedSpec(branches={"all": BranchSpec(adapt=OwnSpec())})


def wan(*attention):
    with torch.device("meta"), Unfilled():
        return SPEC.module(SPEC, attention or (FullSpec(), FullSpec()), grid=Grid(1, 4, 5))


def values(model, seed=0, dtype=torch.float32):
    source = Values(model, seed=seed, dtype=dtype)
    return {slot.name: source.tensor(slot) for slot in source.slots}


class Odd(nn.Module):
    """Shared, buffered, frozen and whole-numbered."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def initial_values(self):
        return {"count": Constant(7.0), "scratch": Constant(1.0), "frozen": Normal(0.5)}


def test_slots_are_the_state_dict_without_repetition():
    model = Odd()
    slots = {slot.name: slot for slot in slots_of(model)}
    assert [name for name, slot in slots.items() if slot.saved] == ["frozen", "count", "a.weight"]
    assert not slots["scratch"].saved
    assert [name for _, name in slots["a.weight"].places] == ["weight", "weight"]
    wan_model = wan()
    assert [slot.name for slot in slots_of(wan_model)] == [name for name, _ in wan_model.named_parameters()]


def test_filling_keeps_ties_types_and_what_is_frozen():
    with torch.device("meta"):
        model = Odd()
    source = Values(model, seed=0, dtype=torch.bfloat16)
    for slot in source.slots:
        slot.put(source.tensor(slot))
    assert model.a.weight is model.b.weight
    assert model.a.weight.dtype == torch.bfloat16
    assert model.count.tolist() == [7, 7]
    assert model.count.dtype == torch.int64
    assert not model.frozen.requires_grad
    assert model.a.weight.requires_grad


def test_a_value_depends_on_its_name_and_the_seed_alone():
    once, again, other = values(wan()), values(wan()), values(wan(), seed=1)
    assert all(torch.equal(once[name], again[name]) for name in once)
    random = [name for name in once if once[name].unique().numel() > 1]
    assert len(random) > 20
    assert not any(torch.equal(once[name], other[name]) for name in random)
    # a change in one layer leaves every other parameter as it was
    changed = values(wan(OWN, FullSpec()))
    assert all(torch.equal(changed[name], once[name]) for name in once)
    # equal shapes in different places are not equal numbers
    assert not torch.equal(once["blocks.0.ffn.0.weight"], once["blocks.1.ffn.0.weight"])


def test_the_seed_is_part_of_the_format():
    # saved recipes promise their numbers: a change here is a change of every model
    number = int.from_bytes(hashlib.sha256(b"3/blocks.0.modulation").digest()[:8], "little")
    expected = torch.randn(16, generator=torch.Generator().manual_seed(number))
    assert torch.equal(torch.randn(16, generator=seeded(3, "blocks.0.modulation")), expected)


def test_casting_is_of_the_same_numbers():
    wide, narrow = values(wan()), values(wan(), dtype=torch.bfloat16)
    assert all(torch.equal(wide[name].to(torch.bfloat16), narrow[name]) for name in wide)


def test_own_projections_start_as_the_hosts():
    got = values(wan(OWN, OWN))
    for layer in (0, 1):
        for which in "qkv":
            own = got[f"blocks.{layer}.attention.branches.all.adapt.{which}.weight"]
            assert torch.equal(own, got[f"blocks.{layer}.self_attn.{which}.weight"])


def test_attention_paths_are_the_outermost():
    assert attention_paths(wan(OWN, FullSpec())) == ["blocks.0.attention", "blocks.1.attention"]


def test_a_parameter_that_nobody_speaks_for():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3))

    with pytest.raises(UltrazooError, match=r"inner\.table: Silent does not say how its parameter 'table' starts"):
        values(nn.ModuleDict({"inner": Silent()}))


def test_random_filling_is_skipped_on_meta_alone():
    with Unfilled():
        kept = torch.empty(4, device="meta").normal_()
        real = torch.zeros(4).normal_()
    assert kept.is_meta
    assert bool((real != 0).all())


def test_streaming_keeps_order_and_bounds_what_is_alive(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    made = []
    most = []

    def make(slot):
        tensor = torch.zeros(slot.shape)
        made.append(weakref.ref(tensor))
        most.append(sum(one() is not None for one in made))
        return tensor

    slots = slots_of(wan())
    names = [name for name, _ in stream(slots, make)]
    assert names == [slot.name for slot in slots]
    assert max(most) <= 5


def test_streaming_passes_errors_on_and_stops_its_threads():
    def make(slot):
        if slot.name == "blocks.0.norm3.weight":
            raise RuntimeError("broken")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="broken"):
        list(stream(slots_of(wan()), make))
    assert not [one for one in threading.enumerate() if one.name.startswith("ultrazoo-weights")]
