"""Every adapted diffusers class against itself: `full` through our adapter, `original`, gradients, checkpointing, removal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ultrazoo
from tests.backbones.adapters.tiny import CASES, TINY, arguments, made, tensors_of
from ultrazoo.backbones.diffusers import ADAPTERS
from ultrazoo.backbones.diffusers.processor import Processor
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio

pytestmark = pytest.mark.filterwarnings("ignore")


def recipe(name: str, attention: Any, at: int = 0, **more: Any) -> dict[str, Any]:
    return {"name": "x", "video": {"grid": list(TINY[name].grids[at])}, "attention": {"*": attention}, **more}


def run(model: nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    return tensors_of(model(**given))


def worst(found: list[torch.Tensor], due: list[torch.Tensor]) -> float:
    assert len(found) == len(due) > 0
    return max(error_ratio(one, other) for one, other in zip(found, due, strict=True))


def test_every_adapter_has_a_tiny_model():
    assert sorted(TINY) == sorted(ADAPTERS)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_through_our_adapter_it_is_the_same_model(name, variant, at):
    model = made(name)
    given = arguments(name, variant, TINY[name].grids[at])
    with torch.no_grad():
        due = run(model, given)
        # built for the first size, run at both
        report = ultrazoo.apply(model, recipe(name, TINY[name].own))
        found = run(model, given)
        assert len(report.models[0].replaced) == len(report.plan.layers)
        assert sum(isinstance(one, Processor) for one in model.modules()) == len(report.plan.layers)
        assert worst(found, due) <= 1e-5
        # null tests: half the answer, no position, another order of tokens
        assert worst([one / 2 for one in found], due) > 0.1
        for processor in model.modules():
            if isinstance(processor, Processor):
                processor.attention.register_forward_hook(_halved)
        assert worst(run(model, given), due) > 1e-3


def _halved(module: nn.Module, args: Any, output: Any) -> Any:
    # one token's answer for all: a common factor would vanish in models that norm what attention returns
    if isinstance(output, tuple):
        return output[0].roll(1, dims=1), output[1]
    return output.roll(1, dims=1)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_gradients_equal(name, variant, checkpointed):
    """Two forwards, at two sizes and timesteps, before one backward."""
    stock = made(name)
    model = copy.deepcopy(stock)
    first, second = (arguments(name, variant, grid, seed) for seed, grid in enumerate(TINY[name].grids))
    ultrazoo.apply(model, recipe(name, TINY[name].own))
    for one in (stock, model):
        one.train()
        if checkpointed:
            one.enable_gradient_checkpointing()
        total = sum(tensor.square().mean() for given in (first, second) for tensor in run(one, given))
        total.backward()
    # what only a discarded text output needs has gradients of zero in the stock model, and none in ours
    due, found = (
        {path: torch.zeros_like(p) if p.grad is None else p.grad for path, p in one.named_parameters()}
        for one in (stock, model)
    )
    assert sorted(found) == sorted(due)
    scale = max(float(grad.square().mean().sqrt()) for grad in due.values())
    for path, grad in due.items():
        # a key's bias has no gradient but rounding: softmax ignores what is common to all keys
        if float(grad.square().mean().sqrt()) > 1e-6 * scale:
            assert error_ratio(found[path], grad) <= 1e-4, path


@pytest.mark.parametrize("name", list(TINY))
def test_original_touches_nothing_and_remove_restores(name):
    model = made(name)
    given = arguments(name, "plain", TINY[name].grids[0])
    keys = list(model.state_dict())
    before = {path: id(m.processor) for path, m in model.named_modules() if hasattr(m, "processor")}
    with torch.no_grad():
        due = run(model, given)
        ultrazoo.apply(model, recipe(name, "original"))
        assert not any(isinstance(one, Processor) for one in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(run(model, given), due, strict=True))
        ultrazoo.remove(model)
        ultrazoo.apply(model, recipe(name, windows(name)))
        changed = run(model, given)
        assert worst(changed, due) > 1e-4
        ultrazoo.remove(model)
        assert all(torch.equal(a, b) for a, b in zip(run(model, given), due, strict=True))
    assert list(model.state_dict()) == keys
    assert {path: id(m.processor) for path, m in model.named_modules() if hasattr(m, "processor")} == before
    assert not [key for key in vars(model) if key in ("select", "session", "plan", "ultrazoo", "cache_context")]
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with pytest.raises(UsageError, match="runs no recipe"):
        ultrazoo.remove(model)


def windows(name: str) -> dict[str, Any]:
    return {"name": "branched", "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}}}}


@pytest.mark.parametrize("name", list(TINY))
def test_a_model_built_from_its_config_is_the_same_model(name):
    stock = made(name)
    given = arguments(name, "plain", TINY[name].grids[0])
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in TINY[name].settings.items()}
    backbone = {"name": "diffusers", "model": name, "config": settings, "text_tokens": TINY[name].text}
    built = ultrazoo.build(recipe(name, windows(name), backbone=backbone, dtype="float32"))
    assert type(built) is type(stock)
    missing, unexpected = built.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(".processor." in key for key in missing)
    ultrazoo.apply(stock, recipe(name, windows(name)))
    with torch.no_grad():
        assert worst(run(built.eval(), given), run(stock, given)) <= 1e-6


@pytest.mark.parametrize("name", list(TINY))
def test_the_plan_counts_what_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    stock = made(name)
    given = arguments(name, "plain", TINY[name].grids[0])
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in TINY[name].settings.items()}
    backbone = {"name": "diffusers", "model": name, "config": settings, "text_tokens": TINY[name].text}
    plan = ultrazoo.plan(recipe(name, TINY[name].own, backbone=backbone, dtype="float32"))
    assert plan.totals.parameters == sum(p.numel() for p in stock.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stock(**given)
    # batch 2
    assert 2 * plan.totals.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
