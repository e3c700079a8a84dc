"""What is read from a program before and after it is written: sizes, shared arithmetic, masks as channels, large tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ultrazoo
from tests.export.conftest import IMAGE, small
from ultrazoo.errors import UsageError
from ultrazoo.export.interior import interior
from ultrazoo.export.measured import measured
from ultrazoo.export.program import drop_idle, program_of, share_sizes
from ultrazoo.export.proof import allowed, cases_in, prepare, ratio, replaced, stand_ins, zeros_of
from ultrazoo.export.quiet import quiet
from ultrazoo.export.scores import is_flash, room
from ultrazoo.export.sizes import Axis, bounds_of, inputs_at, proof_sizes, require_within, sizes_of
from ultrazoo.grid import Grid
from ultrazoo.kernels.door import Inputs
from ultrazoo.kernels.sdpa import keys_as_channel
from ultrazoo.ports import Port

PORTS = (
    Port("latents", (("b", 1), 4, ("t", 1), ("h", 2), ("w", 2))),
    Port("timestep", (("b", 1),), "timestep"),
    Port("text", (("b", 1), ("text", 1), 8)),
)


def bounds(opened=None, grid=(3, 5, 7), lowest=(1, 4, 4)):
    return bounds_of(PORTS, Grid(*grid), lowest, 6, opened)


def test_bounds_are_honest():
    found = bounds()
    assert {axis: (one.low, one.open) for axis, one in found.items()} == {
        "b": (1, True),
        "t": (2, True),
        "h": (4, True),
        "w": (4, True),
        "text": (2, True),
    }
    some = bounds(["h", "b"])
    assert {axis: one.data() for axis, one in some.items() if not one.open} == {
        "t": [3, 3],
        "w": [7, 7],
        "text": [6, 6],
    }
    assert not any(one.open for one in bounds([]).values())
    # an image has its one frame, whatever is open
    assert bounds(grid=(1, 5, 7))["t"].data() == [1, 1]


def test_proof_sizes_are_three_untraced_one_ragged_and_both_batches():
    traced, *others = proof_sizes(bounds())
    assert traced["b"] == 2
    assert {one["b"] for one in others} == {1, 2}
    grids = [(one["t"], one["h"], one["w"]) for one in (traced, *others)]
    assert len(set(grids)) == 3
    # three different primes: no window and no cell divides them
    ragged = grids[2]
    assert len(set(ragged)) == 3
    assert all(size % n for size in ragged for n in range(2, size))
    assert proof_sizes(bounds([])) == [{"b": 1, "t": 3, "h": 5, "w": 7, "text": 6}]


def test_inputs_and_their_sizes_are_inverse():
    at = {"b": 2, "t": 3, "h": 5, "w": 4, "text": 9}
    inputs = inputs_at(PORTS, at, torch.float16, seed=1)
    assert sizes_of(PORTS, inputs) == at
    assert inputs["latents"].shape == (2, 4, 3, 10, 8)
    assert inputs["latents"].dtype == torch.float16
    assert inputs["timestep"].dtype == torch.float32
    low, high = inputs["timestep"].tolist()
    assert 0 <= low < 500 <= high <= 999
    again = inputs_at(PORTS, at, torch.float16, seed=2)
    assert not torch.equal(inputs["latents"], again["latents"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 4, 3, 9, 8)}, "latents has shape"),
        ({"latents": torch.zeros(1, 5, 3, 10, 8)}, "it is \\(b, 4, t, 2\\*h, 2\\*w\\)"),
        ({"latents": torch.zeros(4, 3, 10, 8)}, "latents has shape"),
        ({"text": torch.zeros(2, 9, 8)}, "with b as in the other inputs"),
    ],
)
def test_inputs_that_disagree(change, message):
    inputs = inputs_at(PORTS, {"b": 1, "t": 3, "h": 5, "w": 4, "text": 9}, torch.float32) | change
    with pytest.raises(UsageError, match=message):
        sizes_of(PORTS, inputs)


def test_sizes_outside_the_bounds_are_all_named():
    with pytest.raises(UsageError, match=r"f was not exported for t = 1 \(allowed 2 to 1024\); w = 8 \(allowed 7\)"):
        require_within(bounds(["t"]), {"b": 1, "t": 1, "h": 5, "w": 8, "text": 6}, "f")


def program(recipe, target="pt2", opened=None):
    model = ultrazoo.build(recipe).eval()
    plan = model.plan
    ports = plan.resolved.backbone.ports(image=plan.grid.t == 1)
    text = getattr(plan.resolved.backbone, "text_tokens", 1)
    found = bounds_of(ports, plan.grid, (1, 4, 4), text, opened)
    return model, ports, found, program_of(model, target, ports, found, proof_sizes(found)[0], torch.float32)


class Twice(nn.Module):
    """The same index arithmetic two times, and the same product of data two times."""

    def forward(self, x):
        first = torch.arange(x.shape[1]) % 3
        again = torch.arange(x.shape[1]) % 3
        return (x * x).sum(-1) + (x * x).mean(-1) + first + again


def test_what_follows_from_sizes_is_computed_once_and_nothing_else_is():
    x = torch.randn(2, 6, 4)
    found = torch.export.export(Twice(), (x,), dynamic_shapes={"x": {1: torch.export.Dim("n", min=2)}})
    names = [str(node.target) for node in found.graph.nodes]
    assert names.count("aten.arange.default") == 2
    gone = share_sizes(found)
    after = [str(node.target) for node in found.graph.nodes]
    assert gone >= 2
    assert len(names) - len(after) == gone
    assert after.count("aten.arange.default") == after.count("aten.remainder.Scalar") == 1
    # products of data may be alike too: sharing them is not ours to decide
    assert after.count("aten.mul.Tensor") == 2
    for size in (2, 5, 9):
        other = torch.randn(2, size, 4)
        assert torch.equal(found.module()(other), Twice()(other))


class Casts(nn.Module):
    """Casts that do nothing, one that does, and a dtype that was asked for."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide).sin().to(torch.float32) + x.to(torch.float64).sum(-1, keepdim=True).to(x.dtype)


def test_casts_that_do_nothing_go_and_the_others_stay():
    x = torch.randn(2, 6, 4)
    found = torch.export.export(Casts(), (x,), dynamic_shapes={"x": {1: torch.export.Dim("n", min=2)}})
    before = len(found.graph.nodes)
    gone = drop_idle(found)
    names = [str(node.target) for node in found.graph.nodes]
    assert before - len(names) == gone >= 3
    assert names.count("aten.to.dtype") == 2
    assert not {"aten._assert_tensor_metadata.default", "aten.promote_types.default"} & set(names)
    other = torch.randn(2, 9, 4)
    assert torch.equal(found.module()(other), Casts()(other))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand(x.shape[1]) - torch.rand(x.shape[1])


def test_random_numbers_are_never_shared():
    found = torch.export.export(Noise(), (torch.zeros(2, 5),), dynamic_shapes={"x": {1: torch.export.Dim("n", min=2)}})
    share_sizes(found)
    assert [str(node.target) for node in found.graph.nodes].count("aten.rand.default") == 2
    assert bool(found.module()(torch.zeros(2, 7)).any())


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_a_key_mask_as_a_channel_is_the_mask(dtype, allowed):
    q, k, v = (torch.randn(2, 3, size, 8, dtype=torch.float64) * 3 for size in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) > 0.4
    mask[..., 0] = True
    scores = (q @ k.transpose(-2, -1) * 8**-0.5).masked_fill(~mask, float("-inf"))
    due = scores.softmax(-1) @ v
    given = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), key_mask=mask)
    found = keys_as_channel(given)
    assert found.key_mask is None
    assert found.k.isfinite().all()
    assert found.v is given.v
    got = torch.nn.functional.scaled_dot_product_attention(found.q, found.k, found.v, scale=found.scale)
    assert ratio(got, due) <= allowed
    # a mask that is not there is another answer
    open_ = torch.nn.functional.scaled_dot_product_attention(given.q, given.k, given.v)
    assert ratio(open_, due) > 0.05


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_weights_of_keys_as_a_channel_are_added_to_their_scores(heads, masked):
    q, k, v = (torch.randn(2, 3, size, 8, dtype=torch.float64) * 3 for size in (5, 7, 7))
    weight = torch.randn(2, heads, 1, 7, dtype=torch.float64) * 2
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[..., 5:] = not masked
    scores = (q @ k.transpose(-2, -1) * 8**-0.5 + weight).masked_fill(~mask, float("-inf"))
    found = keys_as_channel(Inputs(q, k, v, key_mask=mask if masked else None, log_weight=weight))
    assert found.key_mask is found.log_weight is None
    got = torch.nn.functional.scaled_dot_product_attention(found.q, found.k, found.v, scale=found.scale)
    assert ratio(got, scores.softmax(-1) @ v) <= 1e-12
    assert ratio(torch.nn.functional.scaled_dot_product_attention(q, k, v), scores.softmax(-1) @ v) > 0.05


def test_a_program_with_flash_attention_holds_nothing_that_grows_faster_than_tokens():
    _, ports, found, made = program(small())
    at = {"b": 1, "t": 3, "h": 8, "w": 8, "text": 6}
    inside = interior(made, ports, found, at)
    assert inside.square is None
    # windows of half the height and width: (windows, heads, tokens, tokens) in fp32
    assert inside.scores is not None
    assert inside.scores.bytes == 4 * 2 * (3 * 4 * 4) ** 2 * 4
    assert inside.scores_at is not None
    assert inside.scores_at({**at, "h": 16}) == 4 * inside.scores.bytes
    assert inside.operators["scaled_dot_product_attention.default"] == 2


def test_a_program_that_holds_queries_by_keys_says_so():
    """Branches of one softmax need its sum, which no operator of torch gives in a graph: scores are a tensor there."""
    branches = {
        "near": {"layout": {"name": "windows", "counts": 2}},
        "far": {"compress": {"name": "depthwise_conv", "factor": 2, "of": "keys"}},
    }
    recipe = IMAGE | {"attention": {"*": {"name": "branched", "branches": branches, "fuse": {"name": "lse"}}}}
    _, ports, found, made = program(recipe)
    at = {"b": 1, "h": 10, "w": 12}
    inside = interior(made, ports, found, at)
    assert inside.scores is None
    assert inside.square is not None
    # four windows, two heads, (5 x 6) squared in fp32
    assert inside.square.bytes == 4 * 2 * 30**2 * 4
    assert inside.scores_at is not None
    assert inside.scores_at({"b": 2, "h": 20, "w": 24}) == 2 * 16 * inside.square.bytes


@pytest.mark.parametrize(("kernel", "holds"), [("auto", False), ("math", True)])
def test_a_script_is_measured_while_it_runs(kernel, holds):
    recipe = IMAGE | {"attention": {"*": {"name": "full", "kernel": kernel}}}
    model = ultrazoo.build(recipe).eval()
    ports = model.plan.resolved.backbone.ports(image=True)
    found = bounds_of(ports, Grid(1, 5, 7), (1, 4, 4), 1, None)
    inputs = inputs_at(ports, {"b": 1, "h": 5, "w": 7}, torch.float32)
    with torch.no_grad(), quiet():
        script = torch.jit.trace(model, tuple(inputs[port.name] for port in ports), check_trace=False)
    inside, at = measured(script, ports, found, torch.float32, torch.device("cpu"))
    assert at == {"b": 1, "h": 8, "w": 8}
    assert inside.largest.bytes >= 64 * 32 * 4
    if holds:
        assert inside.square is not None
        assert inside.square.bytes == 2 * 64 * 64 * 4
        assert inside.scores is None
    else:
        assert inside.square is None
        assert inside.scores is not None
        assert inside.scores.bytes == 2 * 64 * 64 * 4


def test_the_largest_grid_that_fits_a_memory():
    axes = {axis: Axis(axis, 2, 4096) for axis in ("b", "t", "h", "w")}
    at = {"b": 1, "t": 2, "h": 10, "w": 20}

    def scores(sizes):
        return (sizes["t"] * sizes["h"] * sizes["w"]) ** 2

    found = room(scores, axes, at, 1000, 1000 + scores({**at, "h": 30, "w": 60}))
    assert found == {"memory_bytes": 1000 + 3600**2, "fits": True, "largest_grid": [2, 30, 60]}
    small_memory = room(scores, axes, at, 0, 3)
    assert small_memory["fits"] is False
    assert small_memory["largest_grid"] is None
    # a size that is fixed does not grow
    fixed = {axis: Axis(axis, size, size) for axis, size in at.items()}
    assert room(scores, fixed, at, 0, 1 << 40) == {"memory_bytes": 1 << 40, "fits": True, "largest_grid": None}


def test_which_kernels_hold_no_scores():
    flash = ["scaled_dot_product_flash_attention_for_cpu"]
    assert is_flash({"kernels": flash}, {}) is True
    assert is_flash({"kernels": ["scaled_dot_product_efficient_attention", "softmax"]}, {}) is False
    assert is_flash({"kernels": ["Attention"]}, {"Attention": 2}) is False
    assert is_flash({"kernels": []}, {}) is None
    # of three attentions a compiler calls two: it has written the third out
    operators = {"scaled_dot_product_attention.default": 3, "mm.default": 9}
    assert is_flash({"kernels": flash, "attention_calls": 3}, operators) is True
    assert is_flash({"kernels": flash, "attention_calls": 2}, operators) is False


def test_stand_ins_come_from_names_and_go_again(tmp_path):
    model = ultrazoo.build(small()).eval()
    zeros = zeros_of(model)
    assert "head.head.weight" in zeros
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = stand_ins(zeros, torch.float32)
    assert all(
        torch.equal(value, stand_ins({name: zeros[name]}, torch.float32)[name]) for name, value in values.items()
    )
    with replaced(model, values):
        assert zeros_of(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # with them the answer says something
    ports = model.plan.resolved.backbone.ports(image=False)
    cases = [{"b": 1, "t": 2, "h": 4, "w": 4, "text": 3}]
    assert prepare(model, ports, cases, torch.float32, tmp_path) == (zeros, None)


def test_ratio_is_infinite_for_what_is_no_answer():
    due = torch.ones(2, 3)
    assert ratio(torch.ones(3, 2), due) == float("inf")
    assert ratio(torch.full((2, 3), float("nan")), due) == float("inf")
    assert ratio(torch.zeros(2, 3), due) == pytest.approx(1.0)
    assert ratio(due * 1.5, due) == pytest.approx(0.5)


def test_sixteen_bits_may_differ_by_what_one_rounding_does(tmp_path):
    model = ultrazoo.build(small(), dtype="bfloat16").eval()
    ports = model.plan.resolved.backbone.ports(image=False)
    cases = [{"b": 2, "t": 2, "h": 5, "w": 4, "text": 3}, {"b": 1, "t": 2, "h": 4, "w": 4, "text": 3}]
    zeros, rounding = prepare(model, ports, cases, torch.bfloat16, tmp_path)
    # measured here again, at the smaller size
    inputs, due = cases_in(tmp_path)[1]
    moved = inputs["latents"].clone()
    moved[..., 0, 0] *= 1 + 2**-7
    assert 0 < ratio(moved, inputs["latents"]) < 2**-7
    with replaced(model, stand_ins(zeros, torch.bfloat16)), torch.no_grad():
        assert rounding == ratio(model(moved, inputs["timestep"], inputs["text"]), due)
    assert 1e-4 < rounding < 1e-2


@pytest.mark.parametrize(
    ("dtype", "rounding", "due"),
    [("float32", None, 1e-5), ("bfloat16", 4e-3, 1e-2), ("bfloat16", 1.2e-2, 1.8e-2), ("float16", 1e-3, 2e-3)],
)
def test_the_bound_of_a_proof(dtype, rounding, due):
    assert allowed(dtype, rounding) == pytest.approx(due)
