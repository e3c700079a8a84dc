"""What the tests of `apply` on loaded models in every state share: designs, arguments, and one check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ultrazoo
from tests.backbones.adapters.tiny import TINY, arguments
from ultrazoo.testing import error_ratio

WAN = "WanTransformer3DModel"
WINDOWS = {"layout": {"name": "windows", "counts": [2, 2]}}

SHARED = {"name": "branched", "branches": {"near": WINDOWS}}
LORA = {"name": "branched", "branches": {"near": {**WINDOWS, "adapt": {"name": "lora", "rank": 4, "init": "random"}}}}
OWN = {"name": "branched", "branches": {"near": {**WINDOWS, "adapt": "own"}}}


def recipe(attention: Any, name: str = WAN, **more: Any) -> dict[str, Any]:
    return {"name": "x", "video": {"grid": list(TINY[name].grids[0])}, "attention": {"*": attention}, **more}


def given(name: str = WAN, at: int = 0) -> dict[str, Any]:
    return arguments(name, "plain", TINY[name].grids[at])


def run(model: nn.Module, kwargs: dict[str, Any] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(given() if kwargs is None else kwargs))[0]  # type: ignore[no-any-return]


def identities(model: nn.Module) -> dict[str, int]:
    """Every module, parameter and buffer by its object, and every hook's number."""
    found = {f"module {path}": id(module) for path, module in model.named_modules()}
    found |= {f"tensor {path}": id(tensor) for path, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks, *module._forward_hooks):
            found[f"hook {path} {hook}"] = hook
        if hasattr(module, "processor"):
            found[f"processor {path}"] = id(module.processor)
    return found


def full_equals(model: nn.Module, name: str = WAN, allowed: float = 1e-5) -> Tensor:
    """`full` put into `model` gives its own answer, a design another one, and removing them leaves the same objects and
    bits. Returns the answer."""
    arguments = given(name)
    due = run(model, arguments)
    before = identities(model)
    ultrazoo.apply(model, recipe(TINY[name].own, name))
    found = run(model, arguments)
    assert error_ratio(found, due) <= allowed
    assert error_ratio(found / 2, due) > 3 * allowed
    ultrazoo.remove(model)
    ultrazoo.apply(model, recipe(LORA, name))
    assert error_ratio(run(model, arguments), due) > 1e-3
    ultrazoo.remove(model)
    after = identities(model)
    assert list(after) == list(before)
    assert sum(after[key] != before[key] for key in before if key not in _moved(model)) == 0
    assert torch.equal(run(model, arguments), due)
    return due


def _moved(model: nn.Module) -> set[str]:
    """What offloading by submodule makes anew at every call."""
    return {f"tensor {path}" for path, tensor in model.named_parameters() if tensor.is_meta}
