"""timm's vision transformers against themselves: `full`, `original`, gradients, checkpointing, masks, removal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ultrazoo
from tests.backbones.adapters.vits import GRIDS, VITS, image, made, recipe
from ultrazoo.backbones.diffusers.processor import Processor
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio

WINDOWS = {"name": "branched", "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}}}}
NEIGHBORS = {"name": "neighborhood", "kernel_size": [1, 3, 3]}


def outputs(model: Any, x: torch.Tensor, **more: Any) -> list[torch.Tensor]:
    """Logits, and every token by the way that does not go through the model's forward."""
    return [model(x, **more), model.forward_features(x, **more)]


def worst(found: list[torch.Tensor], due: list[torch.Tensor]) -> float:
    return max(error_ratio(one, other) for one, other in zip(found, due, strict=True))


def another_order(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0].roll(1, dims=1), output[1]
    return output.roll(1, dims=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", list(VITS))
def test_through_our_adapter_it_is_the_same_model(name, grid):
    model = made(name)
    x = image(model, grid)
    with torch.no_grad():
        due = outputs(model, x)
        # a model for any size: the recipe is for the first, the image of either
        report = ultrazoo.apply(model, recipe("full", GRIDS[0] if model.dynamic_img_size else grid))
        assert list(report.models[0].replaced) == ["blocks.0.attn", "blocks.1.attn"]
        assert worst(outputs(model, x), due) <= 1e-5
        for module in model.modules():
            if isinstance(module, Processor):
                module.attention.register_forward_hook(another_order)
        assert worst(outputs(model, x), due) > 1e-2, "null test"


@pytest.mark.parametrize("name", ["DINOv3", "EVA-02", "rotation, axes xy", "rotation, learned"])
def test_rows_and_columns_turn_as_the_model_says(name, monkeypatch):
    """Null test of the one above: positions left out, or rows taken for columns."""
    from ultrazoo.backbones.timm import vit

    model = made(name)
    x = image(model, GRIDS[1])
    speeds = vit.speeds
    with torch.no_grad():
        due = outputs(model, x)
        ultrazoo.apply(model, recipe("full"))
        for wrong in (lambda *a: speeds(*a)[::-1], lambda *a: tuple(0 * one for one in speeds(*a))):
            monkeypatch.setattr(vit, "speeds", wrong)
            assert worst(outputs(model, x), due) > 1e-3


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", list(VITS))
def test_gradients_equal(name, checkpointed):
    """Two forwards before one backward, of two sizes with as many tokens."""
    stock = made(name)
    model = copy.deepcopy(stock)
    ultrazoo.apply(model, recipe("full"))
    sizes = ((1, 4, 6), (1, 6, 4)) if stock.dynamic_img_size else (GRIDS[0], GRIDS[0])
    images = [image(stock, grid, seed) for seed, grid in enumerate(sizes)]
    for one in (stock, model):
        one.train()
        one.set_grad_checkpointing(checkpointed)
        sum(tensor.square().mean() for x in images for tensor in outputs(one, x)).backward()
    due, found = ({path: p.grad for path, p in one.named_parameters() if p.grad is not None} for one in (stock, model))
    assert sorted(found) == sorted(due)
    scale = max(float(grad.square().mean().sqrt()) for grad in due.values())
    for path, grad in due.items():
        # a key's bias has no gradient but rounding
        if float(grad.square().mean().sqrt()) > 1e-6 * scale:
            assert error_ratio(found[path], grad) <= 1e-4, path


def test_a_recomputation_sees_the_size_of_its_own_forward():
    """Windows depend on height and width: 4 x 6 and 6 x 4 have as many tokens."""
    plain = made("DINOv2, registers")
    ultrazoo.apply(plain, recipe(WINDOWS))
    saving = copy.deepcopy(plain)
    images = [image(plain, grid) for grid in ((1, 4, 6), (1, 6, 4))]
    for one in (plain, saving):
        one.train().set_grad_checkpointing(one is saving)
        sum(one(x).square().mean() for x in images).backward()
    for (path, found), due in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert error_ratio(found.grad, due.grad) <= 1e-6, path
    alone = copy.deepcopy(plain)
    alone.zero_grad()
    alone(images[0]).square().mean().backward()
    assert error_ratio(alone.cls_token.grad, plain.cls_token.grad) > 1e-2, "null test"


def test_checkpointing_that_hides_the_input_is_refused():
    model = made("DeiT-3").train()
    ultrazoo.apply(model, recipe("full"))
    x = model.norm_pre(model._pos_embed(model.patch_embed(image(model, GRIDS[0]))))
    y = torch.utils.checkpoint.checkpoint(model.blocks, x, use_reentrant=True)
    with pytest.raises(UsageError, match="use_reentrant=False"):
        y.square().mean().backward()


@pytest.mark.parametrize("name", list(VITS))
def test_original_touches_nothing_and_remove_restores(name):
    model = made(name)
    x = image(model, GRIDS[0])
    keys = list(model.state_dict())
    with torch.no_grad():
        due = outputs(model, x)
        ultrazoo.apply(model, recipe("original"))
        assert not any(isinstance(one, Processor) for one in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), due, strict=True))
        ultrazoo.remove(model)
        for attention in (WINDOWS, NEIGHBORS):
            ultrazoo.apply(model, recipe(attention))
            changed = outputs(model, x)
            assert all(one.isfinite().all() for one in changed)
            assert worst(changed, due) > 1e-3
            assert [key for key in model.state_dict() if ".processor." not in key] == keys
            assert sorted(ultrazoo.remove(model)) == ["blocks.0.attn", "blocks.1.attn"]
            assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), due, strict=True))
    assert list(model.state_dict()) == keys
    assert not [key for key in vars(model) if key in ("select", "session", "plan", "ultrazoo")]
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())
    with pytest.raises(UsageError, match="runs no recipe"):
        ultrazoo.remove(model)


def test_some_layers_are_replaced_and_others_stay():
    model = made("DINOv3")
    x = image(model, GRIDS[1])
    report = ultrazoo.apply(model, {**recipe("original"), "attention": {"*": "original", "1": NEIGHBORS}})
    assert report.models[0].kept == ("blocks.0.attn",)
    assert report.models[0].replaced == {"blocks.1.attn": "neighborhood"}
    assert model(x).isfinite().all()
    again = copy.deepcopy(model)
    ultrazoo.remove(model)
    assert again(x).isfinite().all()
    assert error_ratio(again(x), model(x)) > 1e-3


@pytest.mark.parametrize("name", list(VITS))
def test_a_model_built_from_its_name_is_the_same_model(name):
    stock = made(name)
    x = image(stock, GRIDS[0])
    config = {**VITS[name].arguments}
    backbone = {"name": "timm", "model": VITS[name].model, "config": config}
    built = ultrazoo.build(recipe(WINDOWS, backbone=backbone, dtype="float32"))
    assert type(built) is type(stock)
    missing, unexpected = built.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(".processor." in key for key in missing)
    ultrazoo.apply(stock, recipe(WINDOWS))
    with torch.no_grad():
        assert worst(outputs(built.eval(), x), outputs(stock, x)) <= 1e-6


@pytest.mark.parametrize("name", list(VITS))
def test_the_plan_counts_what_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    stock = made(name).requires_grad_(False)
    x = image(stock, GRIDS[0])
    plan = ultrazoo.apply(stock, recipe("full")).plan
    ultrazoo.remove(stock)
    assert plan.totals.parameters == sum(p.numel() for p in stock.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stock(x)
    # batch 2
    assert 2 * plan.totals.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", ["DeiT-3", "DINOv2, registers", "DINOv3", "EVA-02"])
def test_masks_of_keys(name):
    model = made(name)
    x = image(model, GRIDS[1])
    mask = torch.ones(2, 1, 1, 35 + model.num_prefix_tokens, dtype=torch.bool)
    mask[0, ..., -9:] = False
    mask[1, ..., 0] = False
    with torch.no_grad():
        due, open_ = outputs(model, x, attn_mask=mask), outputs(model, x)
        ultrazoo.apply(model, recipe("full"))
        assert worst(outputs(model, x, attn_mask=mask), due) <= 1e-5
        assert worst(outputs(model, x), due) > 1e-3, "null test"
        assert worst(outputs(model, x), open_) <= 1e-5
        for other in (mask.float(), mask.expand(-1, -1, 44, -1), mask[..., 1:]):
            with pytest.raises(UsageError, match="bool mask of keys"):
                model(x, attn_mask=other)
        with pytest.raises(UsageError, match="is_causal"):
            model(x, is_causal=True)


@pytest.mark.parametrize("name", ["DeiT-3", "DINOv3", "EVA-02", "EVA-02, projections apart", "rotation, learned"])
def test_projections_of_a_designs_own_start_as_copies(name):
    """Windows of the whole grid with projections copied are the model's own attention."""
    model = made(name)
    x = image(model, GRIDS[0])
    own = {"layout": {"name": "windows", "counts": [1, 1]}, "adapt": {"name": "own"}}
    with torch.no_grad():
        due = outputs(model, x)
        report = ultrazoo.apply(model, recipe({"name": "branched", "branches": {"all": own}}))
        assert report.models[0].parameters == 2 * 3 * 32 * 33
        found = outputs(model, x)
        # rows in front keep the model's own projections, which are the same
        assert worst(found, due) <= 1e-5
        for module in model.modules():
            if isinstance(module, Processor):
                for parameter in module.parameters():
                    parameter.mul_(1.5)
        assert worst(outputs(model, x), due) > 1e-2, "null test"


def test_by_head_turns_each_head_by_its_own_speeds():
    model = made("rotation, learned")
    x = image(model, GRIDS[1])
    with torch.no_grad():
        due = outputs(model, x)
        ultrazoo.apply(model, recipe({"name": "by_head", "groups": {"0": {"name": "full"}, "1": {"name": "full"}}}))
        assert worst(outputs(model, x), due) <= 1e-5


@pytest.mark.parametrize("name", ["DeiT-3", "DINOv3"])
def test_compiled_afterwards(name):
    model = made(name)
    x = image(model, GRIDS[1])
    ultrazoo.apply(model, recipe(WINDOWS))
    with torch.no_grad():
        due = model(x)
        compiled = torch.compile(model, backend="eager")
        assert error_ratio(compiled(x), due) <= 1e-6
    ultrazoo.remove(compiled)
    assert not any(isinstance(one, Processor) for one in model.modules())
