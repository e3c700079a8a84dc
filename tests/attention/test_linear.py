"""Linear attention: chunks of frames against an explicit running state, its two forms, edge cases, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.export import Dim

from tests.backbones.test_cost import peak_of
from tests.oracles.linear import linear as oracle
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.linear import LinearSpec
from ultrazoo.attention.standalone import Standalone
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import TOLERANCES, assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario
from ultrazoo.testing.tracing import OnMap

ROPE = Rope(axes=(4, 2, 2))
SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(5, 3, 4), rope=ROPE, qk_norm=True)
FP64 = TOLERANCES[torch.float64].output


def scenario(spec, grid=SITE.grid, dtype=torch.float64, **more):
    return Scenario(Example(spec, SITE.at(grid=grid), "linear"), dtype, **more)


def by_running_state(case, chunk):
    """Relu features, rotary numerator: state and normaliser grow chunk by chunk, token by token, in fp64."""
    t, h, w = case.grid
    host = case.host
    place = torch.tensor([(i, j, k) for i in range(t) for j in range(h) for k in range(w)], dtype=torch.float64)
    q, k = (host.split(host.raw(case.x, which), which).clamp(min=0) for which in "qk")
    v = host.split(host.raw(case.x, "v"), "v")
    turned_q, turned_k = host.rotate(q, place), host.rotate(k, place)
    batch, tokens, heads, size = q.shape
    state, total = torch.zeros(batch, heads, size, size).double(), torch.zeros(batch, heads, size).double()
    out = torch.zeros(batch, tokens, heads, size).double()
    for first in range(0, t, chunk):
        inside = range(first * h * w, min(first + chunk, t) * h * w)
        for j in inside:
            state = state + turned_k[:, j, :, :, None] * v[:, j, :, None, :]
            total = total + k[:, j]
        for i in inside:
            numerator = (turned_q[:, i, :, :, None] * state).sum(2)
            out[:, i] = numerator / ((q[:, i] * total).sum(-1, keepdim=True) + 1e-8)
    return host.out(out.flatten(2))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9])
def test_chunks_equal_a_running_state(chunk):
    """Also with a short last chunk, one chunk for all frames and more frames than there are."""
    one = scenario(LinearSpec(causal_chunks=chunk))
    expected = by_running_state(one.case(), chunk)
    assert_close("the oracle", oracle(one.case()), expected, FP64)
    # with gradients all frames at once, without some at a time
    assert_close("at once", one.run(), expected, FP64)
    with torch.no_grad():
        assert_close("running", one.run(), expected, FP64)


@pytest.mark.parametrize("grid", [Grid(5, 3, 4), Grid(1, 4, 5)])
def test_one_chunk_is_bidirectional(grid):
    whole = scenario(LinearSpec(), grid)
    for chunk in (grid.t, grid.t + 3):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                got = scenario(LinearSpec(causal_chunks=chunk), grid).run()
                assert_close(f"chunk {chunk}", got, whole.run(), FP64)
    if grid.t > 1:
        assert error_ratio(scenario(LinearSpec(causal_chunks=1), grid).run(), whole.run()) > 1e-2


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("extra", [False, True])
def test_slabs_change_nothing(chunk, extra, monkeypatch):
    """One frame at a time, two (with a rest) and all of them."""
    one = scenario(LinearSpec(phi="elu", causal_chunks=chunk), Grid(7, 3, 4), extra=extra, key_valid=True)
    with torch.no_grad():
        expected = one.run()
        for frames in (1, 2, 100):
            monkeypatch.setattr("ultrazoo.attention.linear.slab_tokens", lambda *_, frames=frames: 12 * frames)
            found = one.run()
            for a, b in zip(found, expected, strict=True) if extra else [(found, expected)]:
                assert_close(f"{frames} frames", a, b, 1e-13)


@pytest.mark.parametrize("phi", ["relu", "elu", "softmax"])
def test_weights_are_an_average_without_rotation(phi):
    """Where every value is the same, so is every answer; a query whose features are all zero answers zero."""
    one = scenario(LinearSpec(phi=phi, rope="none"))
    host = one.runner.host
    with torch.no_grad():
        host.v.weight.zero_()
        host.o.weight.copy_(torch.eye(24))
        host.o.bias.zero_()
        y = one.run().unflatten(2, (3, 8))
        q, _, _ = host.heads(host.project(one.x, "q"), None, None, None)
    blind = (q <= 0).all(-1) if phi == "relu" else torch.zeros(q.shape[:3], dtype=torch.bool)
    assert blind.any() == (phi == "relu")
    expected = host.v.bias.unflatten(0, (3, 8)).expand_as(y).masked_fill(blind[..., None], 0.0)
    assert_close(phi, y, expected, 1e-6)


def test_rotation_stands_in_the_numerator_alone():
    """A host without rotary embedding, `rope: none` and positions that all are zero say the same."""
    grid = Grid(2, 3, 5)
    bare = SITE.at(grid=grid, rope=None)
    one, same = (Scenario(Example(s, bare, "same"), torch.float64) for s in (LinearSpec(), LinearSpec(rope="none")))
    turned = Scenario(Example(LinearSpec(), SITE.at(grid=grid), "same"), torch.float64)
    plain = Scenario(Example(LinearSpec(rope="none"), SITE.at(grid=grid), "same"), torch.float64)
    with torch.no_grad():
        assert torch.equal(one.run(), same.run())
        assert torch.equal(one.run(), plain.run())
        assert error_ratio(turned.run(), plain.run()) > 1e-2


def test_causal_chunks_export_with_any_number_of_frames():
    one = scenario(LinearSpec(causal_chunks=2), dtype=torch.float32)
    model = OnMap(one.runner).eval()
    sizes = {axis: Dim(name, min=2, max=4096) for axis, name in ((1, "T"), (2, "H"), (3, "W"))}
    shapes = {"z": {0: Dim("B", min=1, max=64), **sizes}, "timestep": {0: Dim("B", min=1, max=64)}}
    with torch.no_grad():
        z = one.x.unflatten(1, tuple(one.grid))
        program = torch.export.export(model, (z, one.timestep), dynamic_shapes=shapes).module()
        for grid, batch in ((Grid(5, 3, 4), 2), (Grid(8, 4, 3), 1), (Grid(2, 5, 2), 3), (Grid(3, 3, 3), 1)):
            at = scenario(LinearSpec(causal_chunks=2), grid, torch.float32, batch=batch)
            got = program(at.x.unflatten(1, tuple(grid)), at.timestep)
            assert_close(f"{grid}, batch {batch}", got, at.run(), TOLERANCES[torch.float32].output)


@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
def test_reach_is_the_union_of_what_is_visible(chunk):
    spec, site = LinearSpec(causal_chunks=chunk), SITE.at(grid=Grid(5, 2, 3))
    visible = spec.visible(site)[0]
    sets = np.random.default_rng(0).random((6, 30)) < 0.05
    sets[0], sets[1] = False, True
    union = np.stack([visible[chosen].any(axis=0) for chosen in sets])
    assert (spec.reach(site, sets) == union).all()
    first_frame = (5 if chunk is None else chunk) * 6
    assert visible[0].sum() == first_frame
    assert visible[-1].all()


def test_16_bits_accumulate_in_32():
    """4000 tokens: sums in bf16 would stop growing long before the last; autocast does not reach them."""
    site = SITE.at(grid=Grid(4, 25, 40))
    one = Scenario(Example(LinearSpec(phi="elu"), site, "long"), torch.bfloat16, batch=1)
    wide = Scenario(Example(LinearSpec(phi="elu"), site, "long"), torch.float32, batch=1)
    assert_close("bf16", one.run(), oracle(one.case()), TOLERANCES[torch.bfloat16].output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = wide.run()
    assert_close("autocast", got, wide.run(), TOLERANCES[torch.bfloat16].output)


def test_denominators_near_zero_stay_finite():
    """Queries and keys on different channels: the rotation alone brings them together, over an empty denominator."""
    one = scenario(LinearSpec(), dtype=torch.bfloat16)
    with torch.no_grad():
        for which, sign in (("q", 1.0), ("k", -1.0)):
            layer = getattr(one.runner.host, which)
            layer.weight.zero_()
            layer.bias.copy_(sign * torch.tensor([1.0, -1.0]).repeat(12))
        y = one.run()
    assert torch.isfinite(y).all()
    assert y.abs().max() > 1e3


def test_bad_options_are_problems():
    for options, path in (({"causal_chunks": 0}, "causal_chunks"), ({"eps": 0}, "eps"), ({"phi": "exp"}, "phi")):
        spec, found = parse_part("attention", {"name": "linear", **options})
        assert spec is None
        assert [problem.path for problem in found] == [path]
    assert LinearSpec(causal_chunks=99).problems(SITE) == []


@pytest.mark.parametrize("grid", [Grid(21, 30, 52), Grid(21, 136, 240)])
def test_flops_are_linear_in_tokens(grid):
    """2 N d D multiply-adds, where full attention has 2 N^2 D: N / d times fewer."""
    site = Site(dim=2240, heads=20, head_dim=112, grid=grid)
    cost, full = LinearSpec().cost(site), FullSpec().cost(site)
    assert cost.attention_flops == 4 * site.tokens * 112 * 2240
    assert full.attention_flops * 112 == cost.attention_flops * site.tokens
    assert (cost.pairs, cost.parameters) == (0, 0)


def saved_elements(module, x, grid):
    """Elements, in the size of x's dtype, that autograd keeps."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, grid)
    return sum(size for size, _ in kept.values()) / x.element_size()


@pytest.mark.parametrize(
    "spec",
    [LinearSpec(), LinearSpec(rope="none"), LinearSpec(phi="elu"), LinearSpec(phi="softmax", causal_chunks=3)],
    ids=lambda spec: f"{spec.phi}-{spec.rope}",
)
def test_memory(spec, monkeypatch):
    monkeypatch.setattr("ultrazoo.attention.linear.slab_tokens", lambda *_: 1)
    site = Site(dim=64, heads=4, head_dim=16, grid=Grid(16, 16, 16), rope=Rope(axes=(4, 6, 6)), qk_norm=True)
    module = Standalone(spec, site).bfloat16()
    x = torch.randn(1, site.tokens, 64, dtype=torch.bfloat16)
    cost = spec.cost(site)
    assert saved_elements(module, x, tuple(site.grid)) == pytest.approx(cost.saved_elements, rel=0.05)
    with torch.no_grad():
        peak = peak_of(lambda: module(x, tuple(site.grid))) / 2
    # elu + 1 needs a frame more for a moment
    assert 0.85 * cost.peak_elements <= peak <= 1.1 * cost.peak_elements
