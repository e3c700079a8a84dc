"""The contract suite finds what is wrong: attentions with one fault each must fail the test that is there for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.gradcheck import GradcheckError

from ultrazoo.attention.contract import Call, Host
from ultrazoo.attention.full import FullAttention, FullSpec
from ultrazoo.grid import Grid
from ultrazoo.ops.init import Constant
from ultrazoo.spec import AttentionSpec, Cost, Rope, Site, Traits, option
from ultrazoo.testing import Case, contract_suite, dense


def site() -> Site:
    return Site(dim=12, heads=2, head_dim=8, grid=Grid(2, 3, 5), rope=Rope((4, 2, 2)))


@dataclass(frozen=True, kw_only=True)
class Sound(FullSpec):
    """Full attention under another name: the suite must have nothing against it."""

    name: ClassVar[str] = "tests/sound"

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        return [(cls(), site()), (cls(), site().at(grid=Grid(1, 4, 3), has_timestep=False))]


class Faulty(FullAttention):
    """Changes the answer of full attention by `fault(y, x)`."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Any:
        found = super().forward(x, host, call)
        y, *rest = found if isinstance(found, tuple) else (found,)
        y = self.fault(y, x, call)
        return (y, *rest) if rest else y

    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y


def suite_of(module: type[FullAttention] | None = None, **changes: Any) -> Any:
    """The contract of full attention with another module or other methods of its spec."""
    body = {"__doc__": "Full attention with one fault.", "__module__": __name__, **changes}
    spec = dataclass(frozen=True, kw_only=True)(type("FaultySpec", (Sound,), body))
    if module is not None:
        spec.module = module
    suite = contract_suite(spec, oracle=changes.get("oracle", dense))()
    return suite, suite.examples[0]


def assert_caught(test: str, module: type[FullAttention] | None = None, *arguments: Any, **changes: Any) -> None:
    """The test of that name fails with an assertion."""
    suite, example = suite_of(module, **changes)
    with pytest.raises(AssertionError):
        getattr(suite, test)(example, *arguments)


class Mixing(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y + 0.01 * (y.mean(0, keepdim=True) - y)


class Writing(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        with torch.no_grad():
            x.mul_(1.5)
        return y


class Remembering(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return y * (1 + 0.01 * self.calls)


class Clinging(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        around: list[Any] = [x * 2]
        around.append(around)
        return y


class Blowing(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y * torch.exp(x.square().mean(-1, keepdim=True)) / torch.exp(x.square().mean(-1, keepdim=True))


class Idle(Faulty):
    """Owns a parameter that takes no part."""

    def __init__(self, spec: AttentionSpec, site: Site):
        super().__init__(spec, site)
        self.idle = nn.Parameter(torch.empty(3))

    def initial_values(self) -> dict[str, Any]:
        return {"idle": Constant(1.0)}


class Silent(Idle):
    """Does not say how its parameter starts."""

    def initial_values(self) -> dict[str, Any]:
        return {}


class Deaf(Faulty):
    """Takes every key, real or not."""

    def forward(self, x: Tensor, host: Host, call: Call) -> Any:
        extra = None if call.extra is None else replace(call.extra, key_mask=None)
        return super().forward(x, host, replace(call, key_valid=None, extra=extra))


class Breaking(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y * 2 if float(x.sum()) > 1e9 else y


class OnMeta(Faulty):
    def __init__(self, spec: AttentionSpec, site: Site):
        super().__init__(spec, site)
        self.table = nn.Buffer(torch.zeros(3, device="cpu"))


class WrongGradient(torch.autograd.Function):
    """The identity, with a derivative of 0.9."""

    @staticmethod
    def forward(_ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return 0.9 * grads[0]


class Misled(Faulty):
    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return WrongGradient.apply(y)


class Slipping(Faulty):
    """Right at the example's size, wrong at others."""

    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y if tuple(call.grid) == tuple(self.site.grid) and call.grid[2] == 5 else y * 1.01


@pytest.mark.parametrize(
    ("test", "module", "arguments"),
    [
        ("test_samples_of_a_batch_do_not_meet", Mixing, ()),
        ("test_calls_leave_nothing_behind", Writing, ()),
        ("test_calls_leave_nothing_behind", Remembering, ()),
        ("test_tensors_go_with_the_call", Clinging, ()),
        ("test_large_inputs_stay_finite", Blowing, ()),
        ("test_gradients_equal_the_oracle_s", Idle, ()),
        ("test_parameters_are_counted", Idle, ()),
        ("test_invalid_tokens_are_never_keys", Deaf, ()),
        ("test_extra_tokens_equal_the_oracle_s", Deaf, ()),
        ("test_masked_extra_tokens_change_nothing", Deaf, ()),
        ("test_meta_build_allocates_nothing", OnMeta, ()),
        ("test_gradients_equal_the_oracle_s", Misled, ()),
        ("test_output_equals_the_oracle_at_other_sizes", Slipping, ()),
        ("test_output_equals_the_oracle", Remembering, (torch.float32,)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_faulty_module_is_caught(test: str, module: type[FullAttention], arguments: tuple[Any, ...]) -> None:
    assert_caught(test, module, *arguments)


def test_a_parameter_without_a_start_is_caught() -> None:
    suite, example = suite_of(Silent)
    with pytest.raises(ValueError, match="how its parameter 'idle' starts"):
        suite.test_every_parameter_says_how_it_starts(example)


def test_a_wrong_derivative_is_caught_without_an_oracle() -> None:
    suite, example = suite_of(Misled)
    with pytest.raises(GradcheckError):
        suite.test_gradcheck(example)


def test_a_graph_break_is_caught() -> None:
    suite, example = suite_of(Breaking)
    with pytest.raises(TorchDynamoException):
        suite.test_compiles_without_graph_breaks(example)


def narrower(self: Any, site: Site, queries: Any = None) -> Any:
    seen = FullSpec.visible(self, site, queries).copy()
    seen[..., 1] = False
    return seen


def one_pair_more(self: Any, site: Site) -> Cost:
    cost = FullSpec.cost(self, site)
    return replace(cost, pairs=cost.pairs + 1)


def no_projection(self: Any, site: Site) -> Cost:
    return replace(FullSpec.cost(self, site), out_flops=0)


def boasting(self: Any) -> Traits:
    return replace(FullSpec.traits(self), exact_at_init=True)


class Wide(Faulty):
    """Not full attention at the start."""

    def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y + 0.1 * x


@pytest.mark.parametrize(
    ("test", "changes"),
    [
        ("test_only_visible_tokens_matter", {"visible": narrower}),
        ("test_pairs_equal_what_reaches_the_kernel", {"cost": one_pair_more}),
        ("test_flops_are_counted", {"cost": no_projection}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spec_that_says_something_wrong_is_caught(test: str, changes: dict[str, Any]) -> None:
    assert_caught(test, None, **changes)


def test_a_false_promise_of_exactness_is_caught() -> None:
    assert_caught("test_a_fresh_block_is_full_attention", Wide, traits=boasting)


def test_influence_that_is_not_declared_is_caught_and_so_is_its_absence() -> None:
    class Local(Faulty):
        """Every token its own answer: declares more than it has."""

        def fault(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
            return host_width(x, y)

    assert_caught("test_only_visible_tokens_matter", Local)


def host_width(x: Tensor, y: Tensor) -> Tensor:
    """The first channels of x, as many as y has."""
    return torch.cat([x, x], dim=-1)[..., : y.shape[-1]]


def undocumented() -> type[AttentionSpec]:
    @dataclass(frozen=True, kw_only=True)
    class Mute(Sound):
        """An option without a word."""

        size: int = option(3)

    return Mute


def test_an_undocumented_option_is_caught() -> None:
    suite = contract_suite(undocumented(), oracle=dense)()
    with pytest.raises(AssertionError, match="size"):
        suite.test_the_spec_is_frozen_data(suite.examples[0])


def test_an_attention_without_examples_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare(Sound):
        @classmethod
        def examples(cls) -> list[tuple[AttentionSpec, Site]]:
            return []

    with pytest.raises(ValueError, match="nothing to test"):
        contract_suite(Bare, oracle=dense)


def test_an_oracle_that_answers_nothing_is_caught() -> None:
    """Zeros from the oracle are not a reference that anything can be compared with."""

    def blank(case: Case) -> Tensor:
        return torch.zeros_like(case.x)

    suite = contract_suite(Sound, oracle=blank)()
    with pytest.raises(AssertionError):
        suite.test_output_equals_the_oracle(suite.examples[0], torch.float32)


TestSound = contract_suite(Sound, oracle=dense)
