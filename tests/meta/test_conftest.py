"""The clean room of `tests/conftest.py` works: poison, seed, dtype, and the GPU canary."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tests.conftest import canary
from ultrazoo.testing.poison import poisoned_memory, restored_state


def inside(code: str) -> object:
    """Run an expression as if it stood in the package."""
    return eval(code, {"__name__": "ultrazoo.somewhere", "torch": torch, "nn": nn})


@pytest.mark.parametrize(
    "code", ["torch.empty(3)", "torch.empty_like(torch.ones(2))", "torch.ones(2).new_empty((4,))"], ids=str
)
def test_uninitialised_memory_is_nan_inside_the_package(code: str) -> None:
    found = inside(code)
    assert isinstance(found, torch.Tensor)
    assert bool(found.isnan().all())


def test_to_empty_is_poisoned_inside_the_package() -> None:
    module = inside("nn.Linear(3, 2, device='meta').to_empty(device='cpu')")
    assert isinstance(module, nn.Linear)
    assert bool(module.weight.isnan().all())
    assert bool(module.bias.isnan().all())


def test_others_are_left_alone() -> None:
    assert torch.empty.__wrapped__ is not None  # type: ignore[attr-defined]
    assert inside("torch.empty(3, device='meta')").device.type == "meta"  # type: ignore[attr-defined]
    assert inside("torch.empty(2, dtype=torch.long)").dtype == torch.long  # type: ignore[attr-defined]
    layer = nn.Linear(3, 2)
    assert not bool(layer.weight.isnan().any())


def test_a_compiler_sees_the_original() -> None:
    made = torch.compile(lambda x: torch.empty_like(x).copy_(x), backend="eager", fullgraph=True)
    with poisoned_memory(__name__):
        assert torch.equal(made(torch.ones(3)), torch.ones(3))


def test_state_is_put_back() -> None:
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()
    with restored_state(seed=5):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        first = torch.rand(3)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    with restored_state(seed=5):
        torch.set_default_dtype(torch.float64)
        assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize("again", [1, 2])
def test_every_test_starts_from_the_same_seed(again: int) -> None:
    assert torch.initial_seed() == 0
    assert random.random() == pytest.approx(0.8444218515250481)


def test_canary() -> None:
    assert canary(["skipped", "skipped"], True, "")
    assert canary([], True, "gpu")
    assert not canary(["skipped", "passed"], True, "gpu")
    assert not canary([], True, "not gpu and not proof")
    assert not canary(["skipped"], False, "")
    assert not canary([], True, "")
