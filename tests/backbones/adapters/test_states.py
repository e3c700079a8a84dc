"""`apply` and `remove` on loaded models: training, copies, files, fused projections, compiled, in pipelines, over steps."""

from __future__ import annotations

import copy
import io
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import ultrazoo
from tests.backbones.adapters.states import LORA, OWN, SHARED, WAN, full_equals, given, identities, recipe, run
from tests.backbones.adapters.tiny import made
from ultrazoo.backbones.diffusers.processor import Processor
from ultrazoo.errors import RecipeError, SiteError, UsageError
from ultrazoo.testing import error_ratio

pytestmark = pytest.mark.filterwarnings("ignore")

PIXART, SD3, COG, QWEN = (
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "CogVideoXTransformer3DModel",
    "QwenImageTransformer2DModel",
)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of two forwards at two sizes before one backward."""
    model.zero_grad()
    sum(model(**given(at=at))[0].square().mean() for at in (0, 1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled blocks"])
def test_a_design_trains_and_recomputing_changes_nothing(compiled):
    model = made(WAN, num_layers=1)
    ultrazoo.apply(model, recipe(LORA))
    model.train()
    due = gradients(model)
    assert {name for name, p in model.named_parameters() if ".processor." in name} <= set(due)
    assert all(grad.abs().sum() > 0 for name, grad in due.items() if ".processor." in name)
    model.enable_gradient_checkpointing()
    if compiled:
        # eager first: what it left behind must not disturb the compiler
        gradients(model)
        model.compile_repeated_blocks(backend="eager")
    found = gradients(model)
    assert sorted(found) == sorted(due)
    assert max(error_ratio(found[name], grad) for name, grad in due.items() if grad.norm() > 1e-5) <= 1e-5
    ultrazoo.remove(model)
    assert type(model._gradient_checkpointing_func).__module__ != "ultrazoo.backbones.adapter"


def test_modes_and_types_follow_the_model():
    model = made(WAN).train()
    ultrazoo.apply(model, recipe(LORA))
    assert all(one.training for one in model.modules() if isinstance(one, Processor))
    model.eval()
    assert not any(one.training for one in model.modules())
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ultrazoo.remove(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [WAN, QWEN])
def test_half_precision(name, dtype):
    exact = run(made(name).double(), {key: wider(value) for key, value in given(name).items()})
    model = made(name).to(dtype)
    kwargs = {key: value.to(dtype) if floating(value) else value for key, value in given(name).items()}
    stock = run(model, kwargs)
    ultrazoo.apply(model, recipe("full", name))
    ours = run(model, kwargs)
    assert ours.dtype == stock.dtype == dtype
    # as far from the truth as the model itself
    assert error_ratio(ours.double(), exact) <= 1.2 * error_ratio(stock.double(), exact) < 0.2
    ultrazoo.remove(model)
    ultrazoo.apply(model, recipe(LORA, name))
    assert {p.dtype for path, p in model.named_parameters() if ".processor." in path} == {dtype}
    assert run(model, kwargs).isfinite().all()


def floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def wider(value: Any) -> Any:
    return value.double() if floating(value) else value


def test_a_copy_lives_for_itself():
    model = made(WAN)
    stock = run(model)
    ultrazoo.apply(model, recipe(LORA))
    due = run(model)
    twin = copy.deepcopy(model)
    assert twin.session is not model.session
    twin.select(3, 5)
    assert model.session.step is None
    with torch.no_grad():
        for parameter in twin.blocks[0].attn1.processor.parameters():
            parameter.zero_()
    assert torch.equal(run(model), due)
    assert not torch.equal(run(twin), due)
    ultrazoo.remove(model)
    assert torch.equal(run(model), stock)
    assert not torch.equal(run(twin), stock)
    ultrazoo.remove(twin)
    assert torch.equal(run(twin), stock)


def test_files_of_an_applied_model(tmp_path):
    model = made(WAN)
    before, stock = identities(model), run(model)
    ultrazoo.apply(model, recipe(LORA))
    due = run(model)
    # pickled whole
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert torch.equal(run(read), due)
    ultrazoo.remove(read)
    assert torch.equal(run(read), stock)
    # a state dict: the model's own keys and the same memory, the design's beside them
    held = model.state_dict()
    own = {key: tensor for key, tensor in held.items() if ".processor." not in key}
    assert len(own) < len(held)
    model.save_pretrained(tmp_path)
    other = made(WAN, seed=5)
    ultrazoo.apply(other, recipe(LORA, seed=7))
    assert not torch.equal(run(other), due)
    other.load_state_dict(held)
    assert torch.equal(run(other), due)
    ultrazoo.remove(model)
    left = model.state_dict()
    assert list(left) == list(own)
    assert all(left[key].data_ptr() == tensor.data_ptr() for key, tensor in own.items())
    assert identities(model) == before
    assert torch.equal(run(type(model).from_pretrained(tmp_path)), stock)


def test_a_second_recipe_is_refused_and_the_first_stays():
    model = made(WAN)
    ultrazoo.apply(model, recipe(SHARED))
    due = run(model)
    with pytest.raises(UsageError, match=r"runs a recipe already; ultrazoo\.remove\(model\) first"):
        ultrazoo.apply(model, recipe("full"))
    assert torch.equal(run(model), due)


def test_what_does_not_fit_is_refused():
    model = made(WAN)
    before = identities(model)
    with pytest.raises(
        UsageError, match=r"its backbone is diffusers/QwenImageTransformer2DModel, the model is .*WanTransformer3DModel"
    ):
        ultrazoo.apply(model, recipe("full", backbone={"name": "diffusers", "model": QWEN}))
    with pytest.raises(UsageError, match="Linear has no adapter; adapters exist for"):
        ultrazoo.apply(nn.Linear(2, 2), recipe("full"))
    with pytest.raises(UsageError, match="a model or a pipeline with a transformer, got int"):
        ultrazoo.apply(3, recipe("full"))
    with pytest.raises(RecipeError, match="windows do not fit"):
        ultrazoo.apply(model, recipe({"name": "ultragen", "windows": 8, "rank": 4}))
    assert identities(model) == before
    # larger windows than a later size has
    ultrazoo.apply(
        model, recipe({"name": "branched", "branches": {"a": {"layout": {"name": "windows", "counts": [4, 6]}}}})
    )
    small = {**given(), "hidden_states": torch.randn(2, 4, 2, 4, 4)}
    with pytest.raises(SiteError, match="windows do not fit"):
        run(model, small)
    assert run(model).isfinite().all()


def test_a_size_that_nothing_divides():
    """Grid (3, 5, 7) from a latent of (3, 11, 15), whose last row and column the model's patches drop."""
    model = made(WAN)
    kwargs = {**given(at=1), "hidden_states": torch.randn(2, 4, 3, 11, 15)}
    due = run(model, kwargs)
    ultrazoo.apply(model, recipe("full"))
    assert error_ratio(run(model, kwargs), due) <= 1e-5
    ultrazoo.remove(model)
    for design in (LORA, OWN, {"name": "ultragen", "windows": 2, "rank": 4}):
        ultrazoo.apply(model, recipe(design))
        assert run(model, kwargs).isfinite().all()
        ultrazoo.remove(model)


# fused projections

PLAIN_SD3 = {"dual_attention_layers": (), "qk_norm": None}
"""The fused SD3 of diffusers 0.42 fails in layers with a second attention, and leaves q/k norms out."""


@pytest.mark.parametrize("name", [WAN, QWEN, PIXART, SD3, COG])
def test_projections_fused_before(name):
    model = made(name, **(PLAIN_SD3 if name == SD3 else {}))
    model.fuse_qkv_projections()
    full_equals(model, name)
    model.unfuse_qkv_projections()
    ultrazoo.apply(model, recipe("full", name))
    assert run(model, given(name)).isfinite().all()


def test_norms_that_fusing_drops_are_kept():
    """diffusers' fused processor of SD3 has no q/k norms, so that fusing changes its answer; ours is that of before."""
    model = made(SD3, dual_attention_layers=())
    due = run(model, given(SD3))
    model.fuse_qkv_projections()
    assert error_ratio(run(model, given(SD3)), due) > 0.1
    ultrazoo.apply(model, recipe("full", SD3))
    assert error_ratio(run(model, given(SD3)), due) <= 1e-5


@pytest.mark.parametrize("name", [WAN, QWEN])
def test_projections_fused_afterwards(name):
    model = made(name)
    due = run(model, given(name))
    ultrazoo.apply(model, recipe("full", name))
    model.fuse_qkv_projections()
    assert error_ratio(run(model, given(name)), due) <= 1e-5
    ultrazoo.remove(model)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, given(name)), due)


@pytest.mark.parametrize("name", [PIXART, SD3, COG])
def test_fusing_that_takes_our_processors_away_is_noticed(name):
    model = made(name, **(PLAIN_SD3 if name == SD3 else {}))
    due = run(model, given(name))
    ultrazoo.apply(model, recipe(LORA, name))
    model.fuse_qkv_projections()
    with pytest.raises(
        UsageError, match=r"processor was replaced .*ultrazoo\.remove\(model\), do it again, then apply"
    ):
        run(model, given(name))
    ultrazoo.remove(model)
    assert error_ratio(run(model, given(name)), due) <= 1e-5
    # what unfusing puts back is the model's own
    model.unfuse_qkv_projections()
    assert not any(isinstance(one, Processor) for one in model.modules())
    assert error_ratio(run(model, given(name)), due) <= 1e-5


def test_copies_of_fused_projections_are_of_what_runs():
    model = made(WAN)
    model.fuse_qkv_projections()
    with torch.no_grad():
        # trained since: the separate projections are stale
        model.blocks[0].attn1.to_qkv.weight.mul_(1.5)
    ultrazoo.apply(model, recipe(SHARED))
    due = run(model)
    ultrazoo.remove(model)
    ultrazoo.apply(model, recipe(OWN))
    assert error_ratio(run(model), due) <= 1e-5


# compiled


@pytest.mark.parametrize("design", ["full", LORA], ids=["full", "lora"])
def test_compiled_afterwards_without_a_break(design):
    torch.compiler.reset()
    model = made(WAN, num_layers=1)
    due = run(model)
    ultrazoo.apply(model, recipe(design))
    if design != "full":
        due = run(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error_ratio(run(compiled), due) <= 1e-5
    assert error_ratio(run(compiled) / 2, due) > 1e-3
    if design == "full":
        # a second size, with symbols for sizes
        assert error_ratio(run(compiled, given(at=1)), run(model, given(at=1))) <= 1e-5


@pytest.mark.parametrize("how", ["object", "in place"])
def test_applied_to_a_compiled_model(how):
    torch.compiler.reset()
    model, plain = made(WAN, num_layers=1), made(WAN, num_layers=1)
    stock = run(plain)
    ultrazoo.apply(plain, recipe(LORA))
    due = run(plain)
    assert error_ratio(stock, due) > 1e-3
    compiled = torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    # what was compiled before the recipe must not run after it
    assert error_ratio(run(compiled), stock) <= 1e-5
    ultrazoo.apply(compiled, recipe(LORA))
    assert error_ratio(run(compiled), due) <= 1e-5
    ultrazoo.remove(compiled)
    assert error_ratio(run(compiled), stock) <= 1e-5


# pipelines


def pipeline(**more: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(),
        **{"transformer": made(WAN), **more},
    )


def test_a_pipeline_with_two_models():
    pipe = pipeline(transformer_2=made(WAN, seed=4, num_layers=3), boundary_ratio=0.9)
    models = pipe.transformer, pipe.transformer_2
    due = [run(model) for model in models]
    report = ultrazoo.apply(pipe, recipe("full"))
    assert [(one.name, len(one.replaced)) for one in report.models] == [("transformer", 2), ("transformer_2", 3)]
    assert all(error_ratio(run(model), one) <= 1e-5 for model, one in zip(models, due, strict=True))
    assert len(ultrazoo.remove(pipe)) == 5
    assert all(torch.equal(run(model), one) for model, one in zip(models, due, strict=True))
    # one of two: the other one alone is removed, and both or none are changed
    ultrazoo.apply(pipe.transformer_2, recipe("full"))
    with pytest.raises(UsageError, match="runs a recipe already"):
        ultrazoo.apply(pipe, recipe("full"))
    assert "ultrazoo" not in vars(pipe.transformer)
    assert len(ultrazoo.remove(pipe)) == 3
    with pytest.raises(UsageError, match="runs no recipe"):
        ultrazoo.remove(pipe)


def test_a_pipeline_whose_model_is_compiled():
    torch.compiler.reset()
    pipe = pipeline()
    due = run(pipe.transformer)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert ultrazoo.apply(pipe, recipe("full")).models[0].model == WAN
    assert error_ratio(run(pipe.transformer), due) <= 1e-5
    assert len(ultrazoo.remove(pipe)) == 2


# steps


def test_steps_between_a_design_and_the_original():
    stock, whole, model = made(WAN), made(WAN), made(WAN)
    ultrazoo.apply(whole, recipe(OWN))
    steps: dict[str, Any] = {"0-1": {"*": "original"}}
    report = ultrazoo.apply(model, recipe(OWN, sampling={"steps": 4}, steps=steps))
    assert len(report.models[0].replaced) == 2
    with pytest.raises(UsageError, match=r"call model\.select\(step, num_steps\) before every denoising step"):
        run(model)
    for step in range(4):
        model.select(step, 4)
        due = run(stock) if step < 2 else run(whole)
        assert torch.equal(run(model), due), step
    ultrazoo.remove(model)
    # the other way about, in one layer
    steps = {"2-3": {"1": OWN}}
    ultrazoo.apply(model, recipe("original", sampling={"steps": 4}, steps=steps))
    model.select(0, 4)
    assert torch.equal(run(model), run(stock))
    model.select(2, 4)
    assert error_ratio(run(model), run(stock)) > 1e-3
    assert [type(block.attn1.processor).__name__ for block in model.blocks] == ["WanAttnProcessor", "WanProcessor"]
    ultrazoo.remove(model)
    assert torch.equal(run(model), run(stock))
