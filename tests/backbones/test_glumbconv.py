"""The gated convolution as a feed-forward: against loops in fp64, in both backbones, priced, exported, refused in chunks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.backbones.models import TINY_DIT, TINY_WAN, randomise, tiny_dit, tiny_wan, wan_inputs
from tests.backbones.test_cost import count, measured_flops, on_meta, peak_of, saved_by_a_layer, self_attention_flops
from ultrazoo import assemble
from ultrazoo.attention.contract import export_form
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.linear import LinearSpec
from ultrazoo.backbones.dit import DitSpec
from ultrazoo.backbones.ffn import FFN, GluMbConv, GluMbConvSpec, MlpSpec
from ultrazoo.backbones.wan import WanSpec
from ultrazoo.errors import RecipeError, SiteError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.testing import TOLERANCES, assert_close, error_ratio, null_answers

BOTH = pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
FP64 = TOLERANCES[torch.float64].output


def silu(z):
    return z / (1 + torch.exp(-z))


def by_loops(weights, x, grid):
    """x (B, N, C) in fp64, tap by tap: what lies outside the frame, or before the first and after the last, is zero."""
    t, h, w = grid
    z = x.reshape(x.shape[0], t, h, w, -1)
    hidden = silu(z @ weights["expand.weight"][:, :, 0, 0].T + weights["expand.bias"])
    mixed = torch.zeros_like(hidden) + weights["depthwise.bias"]
    for i, j, dy, dx in product(range(h), range(w), (-1, 0, 1), (-1, 0, 1)):
        if 0 <= i + dy < h and 0 <= j + dx < w:
            mixed[:, :, i, j] += hidden[:, :, i + dy, j + dx] * weights["depthwise.weight"][:, 0, dy + 1, dx + 1]
    half = mixed.shape[-1] // 2
    y = (mixed[..., :half] * silu(mixed[..., half:])) @ weights["project.weight"][:, :, 0, 0].T
    if "temporal.weight" in weights:
        out = y.clone()
        for frame, step in product(range(t), (-1, 0, 1)):
            if 0 <= frame + step < t:
                out[:, frame] += y[:, frame + step] @ weights["temporal.weight"][:, :, step + 1, 0].T
        y = out
    return y.reshape(x.shape)


def one(temporal, dtype=torch.float64, dim=6, ratio=2.5):
    """A module with random weights of that dtype, the weights in fp64 and an input."""
    module = randomise(GluMbConvSpec(ratio=ratio, temporal=temporal).build(dim, 0)).to(dtype)
    return module, {name: p.detach().double() for name, p in module.named_parameters()}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 4, 5), (4, 1, 3), (2, 1, 1)])
def test_equals_loops(temporal, dtype, grid):
    module, weights = one(temporal, dtype)
    n = grid[0] * grid[1] * grid[2]
    x = (3 * torch.randn(2, n, 6, generator=torch.Generator().manual_seed(n))).to(dtype)
    expected = by_loops(weights, x.double(), grid)
    allowed = TOLERANCES[dtype].output
    assert_close("glumbconv", module(x, grid), expected, allowed)
    for name, wrong in null_answers(expected, x.double()).items():
        assert error_ratio(wrong, expected) > 10 * allowed, name


@BOTH
def test_gradients_equal_those_of_the_loops(temporal):
    module, weights = one(temporal)
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    x = torch.randn(2, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probe = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    found = torch.autograd.grad((module(x, (2, 3, 5)) * probe).sum(), [x, *module.parameters()])
    wanted = torch.autograd.grad((by_loops(weights, x, (2, 3, 5)) * probe).sum(), [x, *weights.values()])
    for name, a, b in zip(["x", *weights], found, wanted, strict=True):
        assert_close(name, a, b, TOLERANCES[torch.float64].gradient)


def test_equals_diffusers():
    """SanaVideo's own feed-forward with the same weights."""
    from diffusers.models.transformers.transformer_sana_video import GLUMBTempConv

    module, _ = one(temporal=True, dtype=torch.float32, dim=8, ratio=3)
    other = GLUMBTempConv(8, 8, 3, residual_connection=False)
    names = {"expand": "conv_inverted", "depthwise": "conv_depth", "project": "conv_point", "temporal": "conv_temp"}
    state = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in module.state_dict().items()}
    other.load_state_dict(state, strict=True)
    x = torch.randn(2, 3 * 5 * 4, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert_close("diffusers", module(x, (3, 5, 4)), other(x.unflatten(1, (3, 5, 4))).flatten(1, 3), 1e-6)


def test_a_token_reaches_its_neighbours_alone():
    """3 x 3 in its own frame; with `temporal` in the frames beside it as well."""
    for temporal, frames in ((False, {2}), (True, {1, 2, 3})):
        module, _ = one(temporal)
        x = torch.randn(1, 5 * 6 * 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        moved = x.clone()
        moved[0, (2 * 6 + 3) * 7 + 2] += 1
        changed = (module(moved, (5, 6, 7)) - module(x, (5, 6, 7))).abs().sum(-1).unflatten(1, (5, 6, 7))[0] > 0
        places = {tuple(place) for place in changed.nonzero().tolist()}
        assert places == {(t, i, j) for t in frames for i in (2, 3, 4) for j in (1, 2, 3)}


def models(temporal, **changes):
    """A Wan and a DiT with the feed-forward, and inputs of theirs at grid (3, 4, 6)."""
    ffn = GluMbConvSpec(temporal=temporal)
    grid = Grid(3, 4, 6)
    wan, dit = tiny_wan(grid=grid, ffn=ffn, **changes), tiny_dit(grid=grid, ffn=ffn, **changes)
    latents, time, text = wan_inputs((3, 8, 12))
    return (wan, (latents, time, text)), (dit, (latents, time, torch.tensor([1, 10])))


@BOTH
def test_a_layer_gives_it_the_modulated_stream(temporal):
    """Replaced by the loops the models answer the same, at another size too; an image is one frame."""

    class Loops(GluMbConv):
        def forward(self, x, grid):
            return by_loops(dict(self.named_parameters()), x, grid)

    for model, inputs in models(temporal):
        model.double()
        inputs = [z.double() if z.is_floating_point() else z for z in inputs]
        with torch.no_grad():
            got = [model(*inputs), model(inputs[0][:, :, :1, :, :6], *inputs[1:])]
            for block in model.blocks:
                block.ffn.__class__ = Loops
            expected = [model(*inputs), model(inputs[0][:, :, :1, :, :6], *inputs[1:])]
        for size, a, b in zip(("video", "image"), got, expected, strict=True):
            assert_close(f"{model.spec.name}, {size}", a, b, FP64)


@BOTH
def test_checkpointing_gives_the_same_gradients(temporal):
    for model, inputs in models(temporal):
        found = []
        for again in (False, True):
            if again:
                model.enable_gradient_checkpointing()
            model.zero_grad()
            model(*inputs).square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, plain in found[0].items():
            assert torch.equal(found[1][name], plain), name
        assert all(g.any() for name, g in found[0].items() if ".ffn." in name)


SPECS = [
    WanSpec(**TINY_WAN, ffn=GluMbConvSpec()),
    WanSpec(**TINY_WAN, ffn=GluMbConvSpec(ratio=1.7, temporal=True)),
    DitSpec(**TINY_DIT, ffn=GluMbConvSpec(ratio=3)),
    DitSpec(**TINY_DIT, ffn=GluMbConvSpec(temporal=True)),
]


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_and_flops_are_counted(spec):
    grid = Grid(3, 4, 6)
    latents, time, text = wan_inputs((3, 8, 12), batch=1)
    inputs = (latents, time, text if isinstance(spec, WanSpec) else torch.zeros(1, dtype=torch.long))
    cost = spec.cost(grid)
    assert count(on_meta(spec, grid)) == cost.parameters
    expected = sum(cost.layer_flops) + cost.outside_flops + self_attention_flops(spec, grid)
    assert measured_flops(on_meta(spec, grid), inputs) == expected


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_training_keeps(temporal, dtype):
    grid = Grid(4, 16, 16)
    ffn = GluMbConvSpec(temporal=temporal)
    latents, time, text = (z.to(dtype) for z in wan_inputs((4, 32, 32), batch=1))
    wan, dit = tiny_wan(grid=grid, ffn=ffn), tiny_dit(grid=grid, ffn=ffn)
    for model, last in ((wan, text), (dit, torch.tensor([3]))):
        spec = model.to(dtype).spec
        predicted = spec.cost(grid).layer_saved_elements[1] + FullSpec().cost(spec.sites(grid)[1]).saved_elements
        assert saved_by_a_layer(model, (latents, time, last)) == pytest.approx(predicted, rel=0.15), spec.name


@BOTH
def test_peak_of_inference(temporal):
    grid = Grid(4, 32, 32)
    ffn = GluMbConvSpec(temporal=temporal, ratio=3)
    latents, time, text = wan_inputs((4, 64, 64), batch=1)
    for model, last in ((tiny_wan(grid=grid, ffn=ffn), text), (tiny_dit(grid=grid, ffn=ffn), torch.tensor([3]))):
        cost = model.spec.cost(grid)
        predicted = cost.stream_elements + cost.layer_peak_elements[0]
        with torch.no_grad():
            measured = peak_of(lambda model=model, last=last: model(latents, time, last)) / 4
        assert 0.9 * predicted <= measured <= 1.1 * predicted, model.spec.name


@BOTH
def test_exports_with_dynamic_sizes(temporal):
    model = tiny_wan(layers=2, ffn=GluMbConvSpec(temporal=temporal), attention=[LinearSpec()] * 2).eval()
    batch, frames, rows, columns = Dim("B"), Dim("F", min=2), Dim("H", min=2), Dim("W", min=2)
    latents = {0: batch, 2: frames, 3: 2 * rows, 4: 2 * columns}
    shapes = {"latents": latents, "timestep": {0: batch}, "text": {0: batch}}
    with torch.no_grad(), export_form(model, "pt2"):
        program = torch.export.export(model, wan_inputs((3, 8, 12)), dynamic_shapes=shapes).module()
    for size, many in (((3, 8, 12), 2), ((5, 14, 6), 1), ((2, 4, 22), 3)):
        inputs = wan_inputs(size, batch=many, seed=7)
        with torch.no_grad():
            assert_close(f"{size}, batch {many}", program(*inputs), model(*inputs), 1e-5)


def test_chunks_are_refused():
    for spec in (WanSpec, DitSpec):
        found = spec(ffn=GluMbConvSpec(), ffn_chunk=64).problems()
        assert [(p.path, p.fix) for p in found] == [("ffn_chunk", "use null, or ffn: mlp")]
        assert spec(ffn=GluMbConvSpec()).problems() == spec(ffn_chunk=64).problems() == []
    with pytest.raises(SiteError, match="64 tokens at a time, but glumbconv mixes"):
        tiny_wan(ffn=GluMbConvSpec(), ffn_chunk=64)
    model = tiny_wan(ffn=GluMbConvSpec())
    model.chunk_ffn(None)
    with pytest.raises(UsageError, match="takes no chunks"):
        model.chunk_ffn(64)


def test_bad_options_are_problems():
    assert [p.path for p in WanSpec(dim=6, heads=1, ffn=GluMbConvSpec(ratio=0.1)).problems()] == ["ffn.ratio"]
    assert WanSpec(dim=6, heads=1, ffn=GluMbConvSpec(ratio=0.17)).problems() == []
    for ffn, path in (
        ({"name": "glumbconv", "ratio": 0}, "ffn.ratio"),
        ({"name": "glumbconv", "temporal": 3}, "ffn.temporal"),
        ({"name": "mlp", "ratio": 2.5}, "ffn.ratio"),
        ("glu", "ffn"),
    ):
        spec, found = parse_part("backbone", {"name": "wan", "ffn": ffn})
        assert spec is None
        assert [problem.path for problem in found] == [path]
    assert set(FFN) == {"mlp", "glumbconv"}


RECIPE = {
    "schema": 1,
    "video": {"grid": [2, 3, 4]},
    "backbone": {"name": "dit", "dim": 32, "layers": 2, "heads": 4, "classes": 3},
    "attention": {"*": {"name": "linear"}},
    "dtype": "float32",
}


def test_the_default_is_the_mlp_under_its_old_names():
    plain, named = (assemble.build(RECIPE, *more) for more in ((), ("backbone.ffn=mlp",)))
    assert plain.plan.hash == named.plan.hash
    assert isinstance(plain.spec.ffn, MlpSpec)
    assert [type(layer) for layer in plain.blocks[0].ffn] == [nn.Linear, nn.GELU, nn.Linear]
    assert "blocks.1.ffn.2.bias" in plain.state_dict()
    other = assemble.build(RECIPE, "backbone.ffn=glumbconv")
    assert other.plan.hash != plain.plan.hash


def test_fresh_weights():
    """Uniform within one over the root of the taps times input channels, as torch starts a convolution; over frames zero."""
    ffn = assemble.build(RECIPE, "backbone.ffn={name: glumbconv, temporal: true}").blocks[1].ffn
    assert not ffn.temporal.weight.any()
    for layer, fan in ((ffn.expand, 32), (ffn.depthwise, 9), (ffn.project, 80)):
        for parameter in layer.parameters():
            assert 0.8 * fan**-0.5 < parameter.abs().max() <= fan**-0.5
    with pytest.raises(RecipeError, match="glumbconv mixes a token"):
        assemble.build(RECIPE, "backbone.ffn=glumbconv", "backbone.ffn_chunk=8")


def test_the_size_of_sana_video():
    """arXiv 2509.24695: 2 B parameters in 20 layers of 2240 channels at ratio 3, 12 C^2 of each layer's in the feed-forward."""
    spec = WanSpec(dim=2240, layers=20, heads=20, text_dim=2304, ffn=GluMbConvSpec(ratio=3, temporal=True))
    assert spec.ffn.parameters(2240, 0) == 12 * 2240**2 + 11 * 6 * 2240
    assert spec.sites(Grid(21, 30, 52))[0].rope.axes == (40, 36, 36)
    assert spec.cost(Grid(21, 30, 52)).parameters == pytest.approx(2.06e9, rel=0.01)
