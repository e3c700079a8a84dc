"""`apply` and `remove` where the model's weights are not plain: quantised, under LoRAs, offloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ultrazoo
from tests.backbones.adapters.states import LORA, OWN, SHARED, WAN, full_equals, given, recipe, run
from tests.backbones.adapters.tiny import made
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio

pytestmark = pytest.mark.filterwarnings("ignore")

QWEN = "QwenImageTransformer2DModel"
CPU = torch.device("cpu")
ULTRAGEN = {"name": "ultragen", "windows": 2, "rank": 4}


class Int8Linear(nn.Module):
    """As bitsandbytes has it: a class of its own, integers with one scale per row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class RoundedTensor(Tensor):
    """As torchao has it: a tensor that says it is fp32 and computes with fewer bits."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(Tensor).bfloat16().float(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def by_class(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "block" in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(module))


def by_tensor(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module) is nn.Linear and "block" in path:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(RoundedTensor), requires_grad=False)


def by_torch(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if path.endswith((".attn1", ".attn")):
            torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)


def by_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def by_casting(model: nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


QUANTISED: dict[str, Callable[[nn.Module], None]] = {
    "a class of its own": by_class,
    "a tensor of its own": by_tensor,
    "torch, dynamic": by_torch,
    "torchao": by_torchao,
    "fp8 storage": by_casting,
}


@pytest.mark.parametrize("how", QUANTISED)
@pytest.mark.parametrize("name", [WAN, QWEN])
def test_full_equals_the_quantised_model(name, how):
    model = made(name)
    plain = run(model, given(name))
    QUANTISED[how](model)
    # activations that fall on the other side of a step of torch's 8 bits move by that step
    due = full_equals(model, name, 1e-2 if how == "torch, dynamic" else 1e-5)
    assert error_ratio(due, plain) > 1e-4


@pytest.mark.parametrize("how", QUANTISED)
def test_copies_of_quantised_weights_are_refused_and_nothing_changes(how):
    model = made(WAN)
    QUANTISED[how](model)
    due = run(model)
    with pytest.raises(
        UsageError, match=r"blocks\.0\.attn1\.to_q.*(not a plain linear|quantised).*adapt: shared and lora"
    ):
        ultrazoo.apply(model, recipe(OWN))
    assert "ultrazoo" not in vars(model)
    assert torch.equal(run(model), due)


def add_lora(model: nn.Module, seed: int = 3) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets), "style")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.mark.parametrize("name", [WAN, QWEN])
def test_a_lora_before_and_after(name):
    kwargs = given(name)
    bare = run(made(name), kwargs)
    due = run(add_lora(made(name)), kwargs)
    assert error_ratio(due, bare) > 0.1

    before = add_lora(made(name))
    full_equals(before, name)

    after = made(name)
    keys = list(after.state_dict())
    ultrazoo.apply(after, recipe("full", name))
    add_lora(after)
    assert error_ratio(run(after, kwargs), due) <= 1e-5
    # removed under the LoRA, and the LoRA from under a recipe
    ultrazoo.remove(after)
    assert torch.equal(run(after, kwargs), due)
    ultrazoo.apply(after, recipe("full", name))
    after.disable_adapters()
    assert error_ratio(run(after, kwargs), bare) <= 1e-5
    after.enable_adapters()
    assert error_ratio(run(after, kwargs), due) <= 1e-5
    after.unload_lora()
    assert error_ratio(run(after, kwargs), bare) <= 1e-5
    ultrazoo.remove(after)
    assert list(after.state_dict()) == keys
    assert torch.equal(run(after, kwargs), bare)


def test_a_copy_would_miss_a_lora():
    model = add_lora(made(WAN))
    with pytest.raises(UsageError, match=r"to_q is wrapped .*merge or unload the adapter first"):
        ultrazoo.apply(model, recipe(OWN))
    model.fuse_lora()
    model.unload_lora()
    # the LoRA is in the weights now: the copies have it, and so has the answer
    ultrazoo.apply(model, recipe(OWN))
    copied = run(model)
    ultrazoo.remove(model)
    ultrazoo.apply(model, recipe(SHARED))
    assert error_ratio(copied, run(model)) <= 1e-5


def test_a_model_inside_peft_is_found():
    peft = pytest.importorskip("peft")
    stock = peft.get_peft_model(made(WAN), peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    due = run(stock.eval())
    ultrazoo.apply(stock, recipe("full"))
    assert error_ratio(run(stock), due) <= 1e-5
    assert ultrazoo.remove(stock) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert torch.equal(run(stock), due)


def by_accelerate(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def by_model(model: nn.Module) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, CPU)


def by_blocks(model: nn.Module) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def by_leaves(model: nn.Module) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")


OFFLOADED = {
    "accelerate, by submodule": by_accelerate,
    "accelerate, whole": by_model,
    "groups of blocks": by_blocks,
    "groups of leaves": by_leaves,
}


@pytest.mark.parametrize("how", OFFLOADED)
def test_full_equals_the_offloaded_model(how):
    model = made(WAN)
    OFFLOADED[how](model)
    due = full_equals(model)
    assert torch.equal(due, run(made(WAN)))


@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("design", [LORA, OWN, ULTRAGEN], ids=["lora", "own", "ultragen"])
def test_offloading_before_and_after(how, design):
    plain = made(WAN)
    stock = run(plain)
    ultrazoo.apply(plain, recipe(design))
    due = run(plain)
    before = made(WAN)
    OFFLOADED[how](before)
    ultrazoo.apply(before, recipe(design))
    assert torch.equal(run(before), due)
    # offloaded again, once more
    assert torch.equal(run(before), due)
    OFFLOADED[how](plain)
    assert torch.equal(run(plain), due)
    for model in (before, plain):
        ultrazoo.remove(model)
        assert torch.equal(run(model), stock)


def test_offloading_that_would_lose_parameters_is_refused(tmp_path):
    model = made(WAN)
    by_blocks(model)
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            if hasattr(hook, "group"):
                # a stream needs an accelerator: only its presence is looked at
                hook.group.stream = object()
    with pytest.raises(UsageError, match="apply first, then enable_group_offload"):
        ultrazoo.apply(model, recipe(LORA))
    # nothing of its own, nothing to lose
    ultrazoo.apply(model, recipe("full"))

    model = made(WAN)
    model.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(UsageError, match=r"to_q is offloaded to disk.*apply before enable_group_offload"):
        ultrazoo.apply(model, recipe(OWN))
    with pytest.raises(UsageError, match="apply first, then wrap"):
        ultrazoo.apply(nn.DataParallel(made(WAN)), recipe(LORA))
