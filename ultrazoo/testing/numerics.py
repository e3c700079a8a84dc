"""The contract's numbers: outputs and gradients against the oracle, exactness at the start, gradcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..attention.contract import Call
from .base import ContractBase, picked, promises
from .compare import assert_close
from .dense import dense
from .scenario import Example, Runner, Scenario, other_grids, pair_up, seeded


def probe(answers: list[tuple[str, Tensor]]) -> Tensor:
    """A scalar that depends on every element of every answer, in its own dtype."""
    parts = [(y * seeded(f"probe {name}", *y.shape).to(y)).sum() for name, y in answers]
    return torch.stack(parts).sum()


class Numerics(ContractBase):
    """Outputs and gradients."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_output_equals_the_oracle(self, example: Example, dtype: torch.dtype) -> None:
        scenario = Scenario(example, dtype)
        with torch.no_grad():
            answer = scenario.run()
            if dtype != torch.float32 and example.expanded.traits().selects:
                # rounded projections choose other keys: what was chosen is compared in wide dtypes only
                assert answer.dtype == dtype
                assert bool(torch.isfinite(answer).all())
                return
            self.assert_answer(answer, self.oracle(scenario.case()), dtype, scenario.x.double())

    def test_output_equals_the_oracle_at_other_sizes(self, example: Example) -> None:
        grids = other_grids(example)
        assert grids, "no grid near the example's own is without problems"
        for grid in grids:
            scenario = Scenario(example, torch.float64, grid=grid, batch=1)
            with torch.no_grad():
                self.assert_answer(scenario.run(), self.oracle(scenario.case()), torch.float64)

    def test_gradients_equal_the_oracle_s(self, example: Example) -> None:
        """Of the input, of every own parameter and of every parameter of the host that takes part."""
        scenario = Scenario(example)
        scenario.x.requires_grad_()
        case = scenario.case(requires_grad=True)
        got, expected = scenario.run(), self.oracle(case)
        rows = pair_up(got, expected)
        probe([(name, y) for name, y, _ in rows]).backward()
        probe([(name, y) for name, _, y in rows]).backward()

        assert scenario.x.grad is not None
        assert case.x.grad is not None
        own = dict(scenario.runner.attention.named_parameters())
        frozen = {name for name, parameter in own.items() if not parameter.requires_grad}
        assert frozen == set(example.expanded.traits().frozen), "frozen parameters are those that the traits name"
        allowed = self.allowed(torch.float32, gradient=True)
        assert_close("gradient of x", scenario.x.grad, case.x.grad, allowed)
        for name, parameter in own.items():
            if name in frozen:
                continue
            reference = case.weights[name].grad
            assert reference is not None, f"the oracle does not use the parameter {name}"
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert bool(parameter.grad.any()), f"the gradient of {name} is zero"
            # a bias before the keys' softmax has a gradient of nearly nothing: compare on the scale of all of them
            floor = 1e-3 * float(case.x.grad.abs().mean())
            if float(reference.square().mean().sqrt()) > floor:
                assert_close(f"gradient of {name}", parameter.grad, reference, 5 * allowed)
        for name, parameter in scenario.runner.host.named_parameters():
            name = f"{name}.weight" if name.startswith("norm_") else name
            reference = case.host.weights[name].grad
            if reference is None:
                assert parameter.grad is None or not bool(parameter.grad.any()), f"{name} should play no part"
            elif float(reference.square().mean().sqrt()) > 1e-3 * float(case.x.grad.abs().mean()):
                assert parameter.grad is not None, f"the host's {name} gets no gradient"
                assert_close(f"gradient of the host's {name}", parameter.grad, reference, 5 * allowed)

    def test_large_inputs_stay_finite(self, example: Example) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            scenario = Scenario(example, dtype, peak=100.0)
            with torch.no_grad():
                y = scenario.run()
                zero = scenario.run(torch.zeros_like(scenario.x))
            assert y.dtype == dtype
            assert bool(torch.isfinite(y).all()), f"{dtype}: not finite for inputs of size 100"
            assert bool(torch.isfinite(zero).all()), f"{dtype}: not finite for zeros"

    @picked(of=promises("exact_at_init"))
    def test_a_fresh_block_is_full_attention(self, example: Example) -> None:
        """The trait `exact_at_init`: nothing changes on pretrained weights until training does."""
        scenario = Scenario(example, torch.float64, random_weights=False)
        with torch.no_grad():
            self.assert_answer(scenario.run(), dense(scenario.case()), torch.float64)

    @picked(first=1)
    def test_gradcheck(self, example: Example) -> None:
        """Derivatives by finite differences, fp64, with respect to the input and the attention's parameters."""
        scenario = Scenario(example, torch.float64, batch=1, peak=1.0)
        runner: Runner = scenario.runner
        names = [name for name, _ in runner.attention.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in runner.attention.parameters()]
        call = Call(grid=tuple(scenario.grid), timestep=scenario.timestep)

        def answer(x: Tensor, *parameters: Tensor) -> Tensor:
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(runner.attention, given, (x, runner.host, call))

        inputs = (scenario.x.requires_grad_(), *values)
        assert torch.autograd.gradcheck(answer, inputs, fast_mode=True, check_undefined_grad=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    @picked(mark="gpu")
    def test_gpu_output_equals_the_oracle(self, example: Example, dtype: torch.dtype) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU: torch finds no CUDA device")
        scenario = Scenario(example, dtype, device="cuda")
        # kernels on tensor cores round fp32 inputs only where TF32 is on: it is off for this comparison
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.no_grad():
                got = scenario.run().cpu()
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        self.assert_answer(got, self.oracle(scenario.case()), dtype)
