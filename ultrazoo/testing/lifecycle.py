"""Building, saving, calling again and checkpointing: what a model does with an attention besides one forward."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..ops.init import initial_tensor, value_of
from .base import ContractBase
from .compare import assert_close
from .scenario import Example, Scenario, other_grids


class _Made(TorchDispatchMode):
    """Weak references to every tensor that is made, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: list[tuple[weakref.ref[Tensor], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.refs += [(weakref.ref(z), tuple(z.shape)) for z in tree_leaves(found) if isinstance(z, Tensor)]
        return found


class LifeCycle(ContractBase):
    """Everything around the forward."""

    def test_state_dict_round_trip(self, example: Example) -> None:
        first, second = Scenario(example), Scenario(example)
        names = set(dict(first.runner.attention.named_parameters()))
        state = copy.deepcopy(first.runner.attention.state_dict())
        assert set(state) == names, "the state dict holds something else than the attention's own parameters"
        with torch.no_grad():
            for parameter in second.runner.attention.parameters():
                parameter.zero_()
            second.runner.attention.load_state_dict(state, strict=True)
            assert torch.equal(second.run(), first.run())

    def test_meta_build_allocates_nothing(self, example: Example) -> None:
        with torch.device("meta"):
            module = example.spec.build(example.site)
        real = [name for name, tensor in module.state_dict().items() if tensor.device.type != "meta"]
        assert real == []
        buffers = [name for name, tensor in module.named_buffers() if tensor.device.type != "meta"]
        assert buffers == []

    def test_every_parameter_says_how_it_starts(self, example: Example) -> None:
        """Initial values exist for every parameter, are finite and repeat with the seed."""
        from ..ops.init import Copy

        with torch.device("meta"):
            attention = example.spec.build(example.site)
        unknown = []
        for name, parameter in attention.named_parameters():
            parent, _, own = name.rpartition(".")
            module = attention.get_submodule(parent)
            if isinstance(value_of(module, own), Copy):
                continue
            values = [initial_tensor(module, own, parameter.shape, torch.Generator().manual_seed(3)) for _ in range(2)]
            if values[0].shape != parameter.shape or not bool(torch.isfinite(values[0]).all()):
                unknown.append(name)
            assert torch.equal(values[0], values[1]), f"{name} does not repeat with its seed"
        assert unknown == []

    def test_calls_leave_nothing_behind(self, example: Example) -> None:
        """Another size and another batch in between change nothing, and the input is not written to."""
        scenario = Scenario(example)
        kept = scenario.x.clone()
        with torch.no_grad():
            first = scenario.run()
            for grid in other_grids(example):
                other = Scenario(example, grid=grid, batch=1)
                other.runner = scenario.runner
                other.run()
            second = scenario.run()
        assert torch.equal(first, second)
        assert torch.equal(scenario.x, kept), "the input was written to"

    def test_tensors_go_with_the_call(self, example: Example) -> None:
        """Nothing that a call made waits for the collector of cycles: on a GPU that is memory that no other layer gets."""
        scenario, collects = Scenario(example), gc.isenabled()
        gc.disable()
        try:
            for learns in (False, True):
                made = _Made()
                with torch.set_grad_enabled(learns):
                    # what is made once is kept
                    scenario.run()
                    with made:
                        scenario.run()
                kept = [(ref, shape) for ref, shape in made.refs if ref() is not None]
                if kept:
                    gc.collect()
                cycles = [shape for ref, shape in kept if ref() is None]
                assert cycles == [], f"tensors of these shapes outlive the call in a cycle of references: {cycles}"
        finally:
            if collects:
                gc.enable()

    def test_two_forwards_before_a_backward_under_checkpointing(self, example: Example) -> None:
        """Recomputation sees the call of its own forward: gradients equal those without checkpointing."""
        grids = [example.site.grid, *other_grids(example)[:1]]

        def gradients(wrap: bool) -> list[Tensor]:
            main = Scenario(example, torch.float64)
            losses, inputs = [], []
            for grid in grids:
                scenario = Scenario(example, torch.float64, grid=grid)
                scenario.runner = main.runner
                x = scenario.x.requires_grad_()
                y = checkpoint(scenario.run, x, use_reentrant=False) if wrap else scenario.run(x)
                losses.append(y.square().sum())
                inputs.append(x)
            torch.stack(losses).sum().backward()
            found = [*inputs, *main.runner.attention.parameters()]
            return [t.grad for t in found if t.grad is not None]

        plain, recomputed = gradients(False), gradients(True)
        assert len(plain) == len(recomputed) > 0
        for i, (one, two) in enumerate(zip(plain, recomputed, strict=True)):
            assert_close(f"gradient {i}", two, one, 1e-12)
