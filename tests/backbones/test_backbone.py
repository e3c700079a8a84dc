"""What every backbone does: checkpointing, chunks, size checks, sampling steps, state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.backbones.models import TINY_WAN, tiny_dit, tiny_wan, wan_inputs
from ultrazoo.attention.contract import Attention
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.ultragen import UltraGenSpec
from ultrazoo.backbones.wan import Wan, WanSpec
from ultrazoo.errors import Problem, SiteError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Start, Traits
from ultrazoo.testing import assert_close, error_ratio


class Scaled(Attention):
    """Full values, scaled by what the call says: every field of a call changes the result."""

    def __init__(self, spec, site):
        super().__init__(spec, site)
        self.weight = torch.nn.Parameter(torch.ones(site.inner))

    def forward(self, x, host, call):
        if call.state is not None:
            call.state["calls"] = call.state.get("calls", 0) + 1
        step = call.step[0] if call.step else 0
        time = (call.timestep / 1000).reshape(x.shape[0], -1).mean(1)[:, None, None]
        return host.out(host.project(x, "v") * self.weight * (1 + step) * (1 + time) * (1 + call.grid[0]))


@dataclass(frozen=True, kw_only=True)
class ScaledSpec(AttentionSpec):
    name: ClassVar[str] = "test/scaled"
    module: ClassVar[type] = Scaled
    rows: int = 2

    def traits(self):
        return Traits(start=Start("exact", "nothing is kept of the host"))

    def problems(self, site):
        if site.grid.h < self.rows:
            return [Problem("rows", f"{self.rows} rows asked of a grid with {site.grid.h}", "use fewer")]
        return []


def loss(out):
    return (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()


def gradients(model):
    """By name; a test attention may leave some of its host's parameters aside."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", [FullSpec(), ScaledSpec(), UltraGenSpec(rank=4)], ids=lambda spec: spec.name)
def test_checkpointing_with_two_forwards_before_the_backward(attention):
    sizes = (3, 16, 24), (2, 18, 26)
    found = []
    for checkpointing in (False, True):
        model = tiny_wan(grid=Grid(3, 8, 12), attention=[attention] * 3)
        if checkpointing:
            model.enable_gradient_checkpointing()
        total = 0
        for index, size in enumerate(sizes):
            model.select(3 * index, 8, "cond")
            total = total + loss(model(*wan_inputs(size, seed=index)))
        # what comes after the forwards must not reach their recomputation
        model.select(7, 8, "uncond")
        total.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 50
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=0, atol=0, msg=name)
        assert plain.abs().max() > 0, name


def test_checkpointing_can_be_switched_off_and_needs_gradients():
    model = tiny_dit()
    inputs = torch.randn(2, 4, 8, 12), torch.tensor([10.0, 900.0]), torch.tensor([1, 10])
    plain = model(*inputs)
    model.enable_gradient_checkpointing()
    with torch.no_grad():
        assert torch.equal(model(*inputs), plain)
    assert torch.equal(model(*inputs), plain)
    model.disable_gradient_checkpointing()
    assert model.gradient_checkpointing is False


@pytest.mark.parametrize("tokens", [1, 7, 24, 72, 1000])
def test_chunked_feed_forward(tokens):
    model = tiny_wan()
    latents, time, text = wan_inputs((3, 8, 12))
    plain = model(latents, time, text)
    loss(plain).backward()
    wanted = gradients(model)
    model.zero_grad()
    model.chunk_ffn(tokens)
    chunked = model(latents, time, text)
    loss(chunked).backward()
    assert_close("with gradients", chunked, plain, 1e-6)
    for name, gradient in gradients(model).items():
        assert_close(name, gradient, wanted[name], 1e-5)
    with torch.no_grad():
        assert_close("without gradients", model(latents, time, text), plain, 1e-6)


def test_the_chunk_of_the_spec_reaches_every_layer():
    model = tiny_wan(ffn_chunk=5)
    assert {block.ffn_chunk for block in model.blocks} == {5}
    with pytest.raises(UsageError, match="at least one token"):
        model.chunk_ffn(0)


def test_a_size_the_attention_cannot_run_lists_every_problem_once():
    attention = [ScaledSpec(rows=2), ScaledSpec(rows=5), ScaledSpec(rows=5)]
    model = tiny_wan(grid=Grid(1, 6, 6), attention=attention)
    assert torch.isfinite(model(*wan_inputs((1, 10, 4)))).all()
    with pytest.raises(SiteError) as caught:
        model(*wan_inputs((1, 2, 4)))
    assert [(p.path, p.rule) for p in caught.value.problems] == [
        ("attention.0.rows", "2 rows asked of a grid with 1"),
        ("attention.1-2.rows", "5 rows asked of a grid with 1"),
    ]
    assert "grid (1, 1, 2)" in str(caught.value)


def test_a_size_the_attention_cannot_run_is_refused_at_construction():
    with pytest.raises(SiteError, match=r"attention.0-2.rows .* 9 rows asked of a grid with 4"):
        tiny_wan(attention=[ScaledSpec(rows=9)] * 3)


def test_a_size_is_checked_once(monkeypatch):
    model = tiny_wan()
    calls = []
    monkeypatch.setattr(model.session, "problems_at", lambda grid: calls.append(grid) or [])
    for _ in range(3):
        model(*wan_inputs((3, 8, 12)))
        model(*wan_inputs((2, 8, 12)))
    assert calls == [Grid(2, 4, 6)]


def test_latents_that_no_patch_divides():
    with pytest.raises(SiteError) as caught:
        tiny_wan()(torch.zeros(1, 4, 2, 7, 5), torch.zeros(1), torch.zeros(1, 7, 12))
    assert {p.path: p.fix for p in caught.value.problems} == {
        "latents.h": "nearest legal: 6 or 8",
        "latents.w": "nearest legal: 4 or 6",
    }


@pytest.mark.parametrize(
    ("latents", "timestep", "text", "message"),
    [
        ((1, 5, 2, 4, 4), (1,), (1, 7, 12), "they are (B, 4, F, h, w)"),
        ((1, 4, 4, 4), (1,), (1, 7, 12), "they are (B, 4, F, h, w)"),
        ((1, 4, 2, 4, 4), (1,), (1, 7, 13), "it is (B, L, 12)"),
        ((1, 4, 2, 4, 4), (1, 3), (1, 7, 12), "(B, T) = (B, 2) or (B, N) = (B, 8)"),
        ((2, 4, 2, 4, 4), (2,), (1, 7, 12), "batch sizes differ"),
        ((2, 4, 2, 4, 4), (), (2, 7, 12), "batch sizes differ"),
    ],
)
def test_wrong_shapes(latents, timestep, text, message):
    with pytest.raises(UsageError) as caught:
        tiny_wan()(torch.zeros(latents), torch.zeros(timestep), torch.zeros(text))
    assert message in str(caught.value)


def test_wrong_number_of_attentions():
    with pytest.raises(UsageError, match="has 3 layers, got 2 attentions"):
        Wan(WanSpec(**TINY_WAN), [FullSpec()] * 2, Grid(1, 2, 2))


def test_dimensions_that_do_not_divide_are_problems():
    assert [p.path for p in WanSpec(dim=100, heads=3, time_dim=7).problems()] == ["heads", "time_dim"]
    assert [p.path for p in WanSpec(dim=30, heads=2).problems()] == ["heads"]
    assert [p.fix for p in WanSpec(patch=(2, 4, 2)).problems()] == ["use [1, 4, 2]"]
    with pytest.raises(SiteError, match="3 heads do not divide dim 100"):
        tiny_wan(dim=100, heads=3)


def test_steps_choose_the_attention_of_a_layer():
    steps = [(0, 1, {1: ScaledSpec()}), (4, 5, {0: ScaledSpec(), 1: ScaledSpec()})]
    model = tiny_wan(steps=steps)
    inputs = wan_inputs((3, 8, 12))
    with pytest.raises(UsageError):
        model(*inputs)
    plain = tiny_wan()
    twin = tiny_wan(attention=[FullSpec(), ScaledSpec(), FullSpec()])
    for other in (plain, twin):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if ".attention." not in k}, strict=False)
    with torch.no_grad():
        for block in twin.blocks:
            for parameter in block.attention.parameters():
                parameter.fill_(1.0)
        for block in model.blocks:
            for parameter in block.attention.parameters():
                parameter.fill_(1.0)
        model.select(2, 6)
        assert_close("step 2", model(*inputs), plain(*inputs), 1e-6)
        model.select(1, 6)
        twin.select(1, 6)
        assert_close("step 1", model(*inputs), twin(*inputs), 1e-6)
        assert error_ratio(plain(*inputs), twin(*inputs)) > 1e-2
    model.deselect()
    with pytest.raises(UsageError):
        model(*inputs)


def test_a_step_that_does_not_exist():
    with pytest.raises(UsageError, match="steps are 0 to 3"):
        tiny_wan().select(4, 4)
    with pytest.raises(UsageError, match=r"step is a whole number, got 1\.5"):
        tiny_wan().select(1.5, 4)


def test_state_belongs_to_layer_and_branch_and_ends_with_the_clip():
    model = tiny_wan(attention=[ScaledSpec()] * 3)
    inputs = wan_inputs((3, 8, 12))

    def calls(branch):
        return [model.session.state[branch][layer]["calls"] for layer in range(3)]

    with torch.no_grad():
        model(*inputs)
        assert model.session.state == {}
        for step in range(3):
            for branch in ("cond", "uncond"):
                model.select(step, 3, branch)
                model(*inputs)
        assert calls("cond") == calls("uncond") == [3, 3, 3]
        model.select(0, 3, "cond")
        model(*inputs)
        assert calls("cond") == [1, 1, 1]
        assert calls("uncond") == [3, 3, 3]
    model(*inputs)
    assert calls("cond") == [1, 1, 1]
    model.reset_state()
    assert model.session.state == {}


@pytest.mark.parametrize("timestep", ["frame", "token"])
def test_gates_follow_the_timestep_of_their_frame_or_token(timestep):
    model = tiny_wan(grid=Grid(3, 8, 12), attention=[UltraGenSpec(rank=4)] * 3)
    latents, time, text = wan_inputs((3, 16, 24), timestep=timestep)
    plain = time[:, :1].expand_as(time)
    with torch.no_grad():
        once = model(latents, time[:, 0], text)
        assert_close("constant", model(latents, plain, text), once, 1e-5)
        assert error_ratio(model(latents, time, text), once) > 1e-2


def test_meta_build_holds_no_storage():
    with torch.device("meta"):
        spec = WanSpec(**TINY_WAN)
        model = Wan(spec, [FullSpec()] * 3, Grid(3, 4, 6))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert list(model.buffers()) == []
    out = model(*(one.to("meta") for one in wan_inputs((3, 8, 12))))
    assert out.shape == (2, 4, 3, 8, 12)
    assert model.plan is None
