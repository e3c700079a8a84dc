"""DiT against diffusers on square images, against loops elsewhere, and at any size."""

from __future__ import annotations

import math

import pytest
import torch

from tests.backbones.models import diffusers_dit, tiny_dit
from ultrazoo.attention.full import FullSpec
from ultrazoo.backbones.dit import Dit, DitSpec
from ultrazoo.errors import SiteError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.testing import assert_close, error_ratio, null_answers

RATIO = 1e-5


def inputs(*size, batch=2, channels=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    latents = 3 * torch.randn(batch, channels, *size, generator=generator)
    return latents, torch.rand(batch, generator=generator) * 1000, torch.randint(0, 11, (batch,), generator=generator)


@pytest.mark.parametrize(("side", "patch"), [(4, 2), (10, 2), (8, 4)])
def test_square_images_equal_diffusers(side, patch):
    model = tiny_dit(patch=patch)
    other = diffusers_dit(model, side)
    latents, time, labels = inputs(side, side)
    with torch.no_grad():
        ours = model(latents, time, labels)
        theirs = other(latents, time, labels).sample
    assert ours.shape == (2, 8, side, side)
    assert_close("dit", ours, theirs, RATIO)
    for name, wrong in null_answers(theirs).items():
        assert error_ratio(wrong, theirs) > 100 * RATIO, name


def test_gradients_equal_diffusers():
    model = tiny_dit()
    other = diffusers_dit(model, 8)
    latents, time, labels = inputs(8, 8)
    probe = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    for one in (model, other):
        out = one(latents, time, labels) if one is model else one(latents, time, labels).sample
        (out * probe).sum().backward()
    theirs = {name: p.grad for name, p in other.named_parameters()}
    for i in range(3):
        for a, b in (("self_attn.q", "attn1.to_q"), ("self_attn.o", "attn1.to_out.0"), ("ffn.0", "ff.net.0.proj")):
            mine = model.get_submodule(f"blocks.{i}.{a}").weight.grad
            assert_close(f"{i} {a}", mine, theirs[f"transformer_blocks.{i}.{b}.weight"], 5 * RATIO)
        mine = model.blocks[i].modulation[1].weight.grad
        assert_close(f"{i} modulation", mine, theirs[f"transformer_blocks.{i}.norm1.linear.weight"], 5 * RATIO)
    table = sum(theirs[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] for i in range(3))
    # every layer of diffusers' has its own table
    assert_close("classes", model.label_embedding.weight.grad, table, 5 * RATIO)
    assert_close("patches", model.patch_embedding.weight.grad[:, :, 0], theirs["pos_embed.proj.weight"], 5 * RATIO)


def loops(model, latents, time, labels):
    """One sample, fp64, token by token, from the formulas; latents (C, F, h, w)."""
    spec, w = model.spec, {name: p.double() for name, p in model.named_parameters()}
    C, p, heads = spec.dim, spec.patch, spec.heads
    frames, rows, columns = latents.shape[1], latents.shape[2] // p, latents.shape[3] // p

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(x):
        return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + spec.eps)

    def sincos(position, channels):
        angles = [position * 10000 ** (-i / (channels // 2)) for i in range(channels // 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    angles = [float(time) * 10000 ** (-i / 128) for i in range(128)]
    sinusoid = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    condition = linear("time_embedding.2", silu(linear("time_embedding.0", sinusoid)))
    condition = condition + w["label_embedding.weight"][labels]

    kernel, tokens = w["patch_embedding.weight"][:, :, 0], []
    for t in range(frames):
        for i in range(rows):
            for j in range(columns):
                pixels = latents[:, t, i * p : (i + 1) * p, j * p : (j + 1) * p].double()
                token = torch.einsum("ocab,cab->o", kernel, pixels) + w["patch_embedding.bias"]
                place = torch.cat([sincos(j, C // 2), sincos(i, C // 2)]) + sincos(t, C) - sincos(0, C)
                tokens.append(token + place)

    def attention(at, xs):
        def split(which):
            return [linear(f"{at}.self_attn.{which}", x).reshape(heads, -1) for x in xs]

        q, k, v = split("q"), split("k"), split("v")
        out = []
        for a in range(len(xs)):
            scores = torch.stack([(q[a] * k[b]).sum(-1) for b in range(len(xs))]) / math.sqrt(C // heads)
            weights = torch.softmax(scores, dim=0)
            mixed = sum(weights[b][:, None] * v[b] for b in range(len(xs)))
            out.append(linear(f"{at}.self_attn.o", mixed.flatten()))
        return out

    for layer in range(spec.layers):
        at = f"blocks.{layer}"
        b1, s1, g1, b2, s2, g2 = linear(f"{at}.modulation.1", silu(condition)).chunk(6)
        ys = attention(at, [norm(x) * (1 + s1) + b1 for x in tokens])
        tokens = [x + g1 * y for x, y in zip(tokens, ys, strict=True)]
        ys = [linear(f"{at}.ffn.2", gelu(linear(f"{at}.ffn.0", norm(x) * (1 + s2) + b2))) for x in tokens]
        tokens = [x + g2 * y for x, y in zip(tokens, ys, strict=True)]
    shift, scale = linear("head.modulation.1", silu(condition)).chunk(2)
    out = torch.empty(spec.outputs * latents.shape[0], *latents.shape[1:], dtype=torch.float64)
    for n, x in enumerate(tokens):
        t, i, j = n // (rows * columns), n // columns % rows, n % columns
        y = linear("head.head", norm(x) * (1 + scale) + shift).reshape(p, p, -1)
        out[:, t, i * p : (i + 1) * p, j * p : (j + 1) * p] = y.permute(2, 0, 1)
    return out


@pytest.mark.parametrize("size", [(6, 14), (3, 10, 6), (2, 2, 10)], ids=str)
def test_images_and_videos_that_are_not_square_equal_loops(size):
    model = tiny_dit(layers=2)
    latents, time, labels = inputs(*size)
    with torch.no_grad():
        ours = model(latents, time, labels)
        wanted = torch.stack(
            [
                loops(model, one if one.ndim == 4 else one[:, None], t, label)
                for one, t, label in zip(latents, time, labels, strict=True)
            ]
        )
    if latents.ndim == 4:
        wanted = wanted[:, :, 0]
    assert_close(str(size), ours, wanted, RATIO)
    for name, wrong in null_answers(wanted).items():
        assert error_ratio(wrong, wanted) > 100 * RATIO, name


def test_a_video_of_one_frame_is_an_image():
    model = tiny_dit()
    latents, time, labels = inputs(10, 6)
    with torch.no_grad():
        assert_close("one frame", model(latents[:, :, None], time, labels)[:, :, 0], model(latents, time, labels), 1e-6)


@pytest.mark.parametrize("count", [1, 3, 45], ids=["sample", "frame", "token"])
def test_one_timestep_in_every_shape(count):
    model = tiny_dit()
    latents, time, labels = inputs(3, 6, 10)
    with torch.no_grad():
        plain = model(latents, time, labels)
        assert_close(str(count), model(latents, time[:, None].expand(-1, count), labels), plain, RATIO)
        other = torch.linspace(0, 900, 2 * count).reshape(2, count)
        assert error_ratio(model(latents, other, labels), plain) > 1e-2


def test_positions_that_fit_keep_the_trained_range():
    index, fit = tiny_dit(), tiny_dit(positions="fit", trained=(1, 4, 4))
    small, large = inputs(8, 8), inputs(16, 24)
    with torch.no_grad():
        assert_close("at the trained size", fit(*small), index(*small), 1e-6)
        assert error_ratio(fit(*large), index(*large)) > 1e-2
    assert [p.path for p in DitSpec(positions="fit").problems()] == ["positions"]


def test_the_condition_matters():
    model = tiny_dit()
    latents, time, labels = inputs(6, 8)
    with torch.no_grad():
        plain = model(latents, time, labels)
        assert error_ratio(model(latents, time, (labels + 1) % 11), plain) > 1e-2
        assert error_ratio(model(latents, time / 2, labels), plain) > 1e-2


def test_a_fresh_model_predicts_zero():
    from ultrazoo.ops.init import initial_tensor

    spec = DitSpec(dim=48, heads=2, layers=2, classes=10)
    model = Dit(spec, [FullSpec()] * 2, Grid(1, 3, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(initial_tensor(module, name, parameter.shape, generator))
        assert torch.equal(model(*inputs(6, 8)), torch.zeros(2, 8, 6, 8))
    assert model.blocks[1].modulation[1].weight.abs().max() == 0
    assert model.blocks[1].ffn[0].weight.std() > 0


def test_wrong_shapes_and_sizes():
    model = tiny_dit()
    _, time, labels = inputs(8, 8)
    with pytest.raises(UsageError, match=r"\(B, 4, h, w\)"):
        model(torch.zeros(2, 3, 8, 8), time, labels)
    with pytest.raises(UsageError, match="batch sizes differ"):
        model(torch.zeros(3, 4, 8, 8), time, labels)
    with pytest.raises(SiteError, match="nearest legal: 8 or 10"):
        model(torch.zeros(2, 4, 8, 9), time, labels)
    assert [p.path for p in DitSpec(dim=90, heads=4).problems()] == ["heads", "dim"]
