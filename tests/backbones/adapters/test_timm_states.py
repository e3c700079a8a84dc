"""`apply` and `remove` on timm models that are quantised, under LoRAs or offloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ultrazoo
from tests.backbones.adapters.states import LORA, OWN
from tests.backbones.adapters.test_states_weights import CPU, Int8Linear, RoundedTensor, by_accelerate, by_model
from tests.backbones.adapters.vits import GRIDS, image, made, recipe
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio

NAMES = ["DeiT-3", "DINOv3", "EVA-02, projections apart"]


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def tokens(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Every token of the last layer: enough numbers for an average over errors of rounding."""
    with torch.no_grad():
        return model.forward_features(x)  # type: ignore[no-any-return]


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    found = [(path, module) for path, module in model.named_modules() if type(module) is nn.Linear]
    return [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], one) for path, one in found]


def by_class(model: nn.Module) -> None:
    for parent, name, linear in linears(model):
        setattr(parent, name, Int8Linear(linear))


def by_tensor(model: nn.Module) -> None:
    for _, _, linear in linears(model):
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(RoundedTensor), requires_grad=False)


def add_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    where = r".*attn\.(qkv|q_proj|proj)|.*mlp\.fc1\w*|patch_embed\.proj"
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=where, init_lora_weights=False)).eval()


def equals(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`full` put in gives the model's own answer, a design another one; taken out, every bit is back. The answer."""
    due = run(model, x)
    ultrazoo.apply(model, recipe("full"))
    assert error_ratio(run(model, x), due) <= 1e-5
    ultrazoo.remove(model)
    ultrazoo.apply(model, recipe(LORA))
    assert error_ratio(run(model, x), due) > 5e-2
    ultrazoo.remove(model)
    assert torch.equal(run(model, x), due)
    return due


@pytest.mark.parametrize("how", [by_class, by_tensor])
@pytest.mark.parametrize("name", NAMES)
def test_full_equals_the_quantised_model(name, how):
    model = made(name)
    x = image(model, GRIDS[1])
    plain = run(model, x)
    how(model)
    assert error_ratio(equals(model, x), plain) > 1e-4
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.q\w+.*(not a plain linear|quantised)"):
        ultrazoo.apply(model, recipe(OWN))
    assert "ultrazoo" not in vars(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_full_is_as_exact_as_a_model_of_torchs_8_bits(name):
    """Its activations have one scale a call, and rows in front of the patches are a call of their own with us."""
    model = made(name)
    x = image(model, GRIDS[1])
    plain = tokens(model, x)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    due = tokens(model, x)
    ultrazoo.apply(model, recipe("full"))
    assert 1e-3 < error_ratio(tokens(model, x), plain) <= 1.15 * error_ratio(due, plain)
    ultrazoo.remove(model)
    assert torch.equal(tokens(model, x), due)
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.q\w+.*not a plain linear"):
        ultrazoo.apply(model, recipe(OWN))


@pytest.mark.parametrize("name", NAMES)
def test_full_equals_the_model_under_a_lora(name):
    model = made(name)
    x = image(model, GRIDS[1])
    plain = run(model, x)
    wrapped = add_lora(model)
    due = equals(wrapped, x)
    assert error_ratio(due, plain) > 0.1
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.q\w+ is wrapped .*merge or unload the adapter first"):
        ultrazoo.apply(wrapped, recipe(OWN))
    # put around a recipe
    model = made(name)
    ultrazoo.apply(model, recipe("full"))
    assert error_ratio(run(add_lora(model), x), due) <= 1e-5


def test_another_size_is_still_noticed_under_a_lora():
    torch.manual_seed(0)
    wide = add_lora(made("DeiT-3", mlp_ratio=2))
    with pytest.raises(UsageError, match=r"is not what timm\.create_model.*blocks\.0\.mlp\.fc1 and"):
        ultrazoo.apply(wide, recipe("full"))


def by_dispatch(model: nn.Module) -> None:
    """Hooks on every module, as models that are spread over devices have them."""
    from accelerate.hooks import attach_execution_device_hook

    attach_execution_device_hook(model, CPU)


# accelerate alone gives wrong numbers for EVA-02's fused projections by submodule: timm reads their weight past its hooks
OFFLOADED = [(name, how) for name in ("DeiT-3", "DINOv3") for how in (by_accelerate, by_model, by_dispatch)] + [
    ("EVA-02", by_model),
    ("EVA-02", by_dispatch),
]


@pytest.mark.parametrize(("name", "how"), OFFLOADED)
@pytest.mark.parametrize("design", [LORA, OWN], ids=["lora", "own"])
def test_offloading_before_and_after(name, how, design):
    plain = made(name)
    x = image(plain, GRIDS[1])
    stock = run(plain, x)
    ultrazoo.apply(plain, recipe(design))
    due = run(plain, x)
    assert error_ratio(due, stock) > 5e-2
    before = made(name)
    how(before)
    assert torch.equal(run(before, x), stock)
    ultrazoo.apply(before, recipe(design))
    assert torch.equal(run(before, x), due)
    assert torch.equal(run(before, x), due), "offloaded again, once more"
    how(plain)
    assert torch.equal(run(plain, x), due)
    for model in (before, plain):
        ultrazoo.remove(model)
        assert torch.equal(run(model, x), stock)


def test_hooks_of_offloading_taken_away_again():
    from accelerate.hooks import remove_hook_from_module

    model = made("EVA-02")
    x = image(model, GRIDS[1])
    stock = run(model, x)
    by_dispatch(model)
    ultrazoo.apply(model, recipe(LORA))
    due = run(model, x)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model, x), due)
    ultrazoo.remove(model)
    assert torch.equal(run(model, x), stock)
    by_dispatch(model)
    remove_hook_from_module(model, recurse=True)
    # accelerate leaves the class's own forward as an attribute
    ultrazoo.apply(model, recipe(LORA))
    assert torch.equal(run(model, x), due)
