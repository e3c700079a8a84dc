"""Predicted activation memory against the bytes torch really holds, counted allocation by allocation on the CPU."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.backbones.dit import Dit, DitSpec
from ultrazoo.backbones.wan import Wan, WanSpec
from ultrazoo.cost import price
from ultrazoo.grid import Grid


class Held(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive; `peak` is the most at once."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}
        self._ignored = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live or key in self._ignored:
            return
        self._live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def measured(model, inputs) -> dict[str, int]:
    """Peak bytes of activations: parameter gradients are taken off."""
    gradients = sum(one.numel() * one.element_size() for one in model.parameters())
    found = {}
    with torch.no_grad(), Held(model) as held:
        model(*inputs)
    found["infer"] = held.peak
    for mode in ("train", "train_checkpointed"):
        if mode == "train_checkpointed":
            model.enable_gradient_checkpointing()
        with Held(model) as held:
            model(*inputs).float().sum().backward()
        found[mode] = held.peak - gradients
        model.zero_grad(set_to_none=True)
    return found


WAN = WanSpec(dim=192, heads=4, layers=4, ffn_dim=1120, text_dim=64, text_tokens=16, time_dim=32)
DIT = DitSpec(dim=192, heads=4, layers=4, classes=10)
WAN_INPUTS = (torch.zeros(1, 16, 3, 32, 48), torch.zeros(1), torch.zeros(1, 16, 64))
DIT_INPUTS = (torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, dtype=torch.long))
CASES = {
    "wan, full": (Wan, WAN, Grid(3, 16, 24), WAN_INPUTS, FullSpec(), torch.float32),
    "wan, ultragen": (Wan, WAN, Grid(3, 16, 24), WAN_INPUTS, UltraGenSpec(rank=16), torch.float32),
    "wan, chunked": (Wan, replace(WAN, ffn_chunk=200), Grid(3, 16, 24), WAN_INPUTS, FullSpec(), torch.float32),
    "wan, bf16": (Wan, WAN, Grid(3, 16, 24), WAN_INPUTS, FullSpec(), torch.bfloat16),
    "dit, full": (Dit, DIT, Grid(1, 32, 32), DIT_INPUTS, FullSpec(), torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_activation_memory_is_predicted(case):
    module, spec, grid, inputs, attention, dtype = CASES[case]
    sites = spec.sites(grid)
    expanded = [attention.expand(site) for site in sites]
    plan = price(spec, sites, expanded, grid=grid, dtype=str(dtype).removeprefix("torch."))
    model = module(spec, [attention] * spec.layers, grid).to(dtype)
    inputs = [one.to(dtype) if one.is_floating_point() else one for one in inputs]
    got = measured(model, inputs)
    ratios = {mode: size / got[mode] for mode, size in plan.totals.activation_bytes.data().items()}
    assert all(0.85 < ratio < 1.3 for ratio in ratios.values()), ratios
