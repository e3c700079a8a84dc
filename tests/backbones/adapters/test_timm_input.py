"""Which timm models and recipes are refused, with what words; and what a recipe has to say about a changed model."""

from __future__ import annotations

import functools
import re

import pytest
import timm
import torch
from torch import nn

import ultrazoo
from tests.backbones.adapters.vits import GRIDS, VITS, image, made, recipe
from ultrazoo.errors import RecipeError, UsageError
from ultrazoo.testing import error_ratio

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timm.create_model("resnet10t"), "ResNet is not one of timm's VisionTransformer and Eva"),
        (lambda: timm.create_model("swin_s3_tiny_224"), "SwinTransformer is not one of"),
        (lambda: timm.create_model("samvit_base_patch16", img_size=64, **TINY), "VisionTransformerSAM is not one of"),
        (lambda: timm.create_model("naflexvit_base_patch16_gap", **TINY), "NaFlexVit is not one of"),
        (lambda: timm.create_model("vit_small_patch16_18x2_224", **TINY), "block 0 is NoneType"),
        (lambda: nn.Linear(2, 2), r"torch.*Linear has no adapter.*VisionTransformer and Eva of timm.*plugin"),
        (lambda: timm.models.VisionTransformer(32, **TINY), "by which name timm made it"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", mlp_ratio=2, **TINY),
            "is not what timm.create_model.*'vit_tiny_patch16_224'.*blocks.0.mlp",
        ),
        (
            lambda: timm.create_model("vit_small_patch16_rope_224", num_kv_heads=1, qkv_fused=False, **TINY),
            "shares keys between heads",
        ),
    ],
)
def test_models_that_no_adapter_serves(make, words):
    model = make()
    before = list(model.state_dict())
    with pytest.raises(UsageError, match=words):
        ultrazoo.apply(model, recipe("full"))
    assert list(model.state_dict()) == before
    assert "ultrazoo" not in vars(model)


WRONG = [
    ({"model": "deit3_small_patch16_225"}, "did you mean 'deit3_small_patch16_224'"),
    ({"model": "hf-hub:timm/vit_tiny_patch16_224"}, "has no model"),
    ({"model": "resnet10t"}, "no adapter serves resnet10t"),
    ({"model": "vit_tiny_patch16_224", "config": {"pretrained": True}}, "config.pretrained.*recipe's `weights`"),
    ({"model": "vit_tiny_patch16_224", "config": {"checkpoint_path": "x"}}, "config.checkpoint_path"),
    ({"model": "vit_tiny_patch16_224", "config": {"no_such": 1}}, "timm cannot make.*no_such"),
    ({"model": "vit_tiny_patch16_224", "config": "a.json"}, "expected arguments"),
]


@pytest.mark.parametrize(("backbone", "words"), [({}, "the model is not named"), *WRONG])
def test_recipes_that_name_no_model(backbone, words):
    with pytest.raises(RecipeError) as caught:
        ultrazoo.plan(recipe("full", backbone={"name": "timm", **backbone}))
    assert re.search(words, " ".join(str(caught.value).split())), str(caught.value)


@pytest.mark.parametrize(("backbone", "words"), WRONG)
def test_recipes_that_name_no_model_say_so_when_they_are_applied(backbone, words, monkeypatch):
    """Nothing that a recipe may not have reaches timm, which would look on a hub or open a pickle."""
    model = made("DeiT-3")
    create = timm.create_model
    names = []

    @functools.wraps(create)
    def noted(name, **more):
        names.append((name, *more))
        return create(name, **more)

    monkeypatch.setattr(timm, "create_model", noted)
    with pytest.raises(UsageError) as caught:
        ultrazoo.apply(model, recipe("full", backbone={"name": "timm", **backbone}))
    assert re.search(words, " ".join(str(caught.value).split())), str(caught.value)
    assert not [one for one in names if ":" in one[0] or "checkpoint_path" in one]
    assert "ultrazoo" not in vars(model)


@pytest.mark.parametrize(
    ("video", "config", "words"),
    [
        ({"width": 64, "height": 64, "frames": 2}, {}, "sees one image, got 2 frames"),
        ({"grid": [2, 4, 4]}, {}, "sees one image"),
        ({"width": 64, "height": 70}, {}, "nearest legal: 64 or 80"),
        ({"width": 64, "height": 64}, {"dynamic_img_size": False}, "images of 224 x 224 pixels alone"),
    ],
)
def test_sizes_that_a_model_cannot_see(video, config, words):
    given = {
        **recipe("full", backbone={"name": "timm", "model": "vit_tiny_patch16_224", "config": config}),
        "video": video,
    }
    with pytest.raises(RecipeError, match=words):
        ultrazoo.plan(given)


def test_a_recipe_for_another_model_is_refused():
    model = made("DeiT-3")
    for backbone in ({"name": "timm", "model": "vit_tiny_patch16_224"}, {"name": "wan", "preset": "t2v_1_3b"}):
        with pytest.raises(UsageError, match=r"the model is|is not what"):
            ultrazoo.apply(model, recipe("full", backbone=backbone))
    # a tag says where weights come from, not which model it is
    named = {"name": "timm", "model": "deit3_small_patch16_224.fb_in1k"}
    config = {**VITS["DeiT-3"].arguments}
    report = ultrazoo.apply(model, recipe("full", backbone={**named, "config": config}))
    assert len(report.models[0].replaced) == 2


def test_what_cannot_be_read_off_a_model_is_said_in_the_recipe():
    """Norms inside attention by the recipe's config; gates, which timm puts into some models, are followed where they are."""
    settings = {**VITS["DeiT-3"].arguments, "scale_attn_norm": True}
    model = made("DeiT-3", scale_attn_norm=True)
    with pytest.raises(UsageError, match="write backbone: "):
        ultrazoo.apply(model, recipe("full"))
    backbone = {"name": "timm", "model": "deit3_small_patch16_224", "config": settings}
    ultrazoo.apply(model, recipe("full", backbone=backbone))
    x = image(model, GRIDS[1])
    with torch.no_grad():
        ungated = model(x)
        for block in model.blocks:
            block.attn.gate = nn.Linear(32, 32)
        found = model(x)
        ultrazoo.remove(model)
        assert error_ratio(found, model(x)) <= 1e-5
        assert error_ratio(ungated, model(x)) > 1e-2, "null test"


def test_training_that_attentions_of_a_recipe_cannot_follow():
    model = made("DeiT-3", attn_drop_rate=0.1)
    ultrazoo.apply(model, recipe("full"))
    x = image(model, GRIDS[0])
    assert model(x).isfinite().all()
    with pytest.raises(UsageError, match=r"dropout of attention weights \(0.1\)"):
        model.train()(x)
    model = made("DINOv3", rope_rescale_coords=2.0)
    ultrazoo.apply(model, recipe("full"))
    assert model(x).isfinite().all()
    with pytest.raises(UsageError, match="moved at random"):
        model.train()(x)
    model = made("DeiT-3", patch_drop_rate=0.5)
    ultrazoo.apply(model, recipe("full"))
    with pytest.raises(UsageError, match="got 8 tokens for grid"):
        model.train()(x)


def test_a_size_at_which_the_recipe_cannot_run():
    model = made("DINOv3")
    ultrazoo.apply(
        model, recipe({"name": "branched", "branches": {"a": {"layout": {"name": "windows", "counts": [4, 4]}}}})
    )
    with pytest.raises(UsageError, match="grid"):
        model(torch.randn(1, 3, 32, 32))
    assert model(torch.randn(1, 3, 96, 64)).isfinite().all()


def test_a_forward_that_somebody_else_replaced():
    model = made("DeiT-3")
    stock = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda *args, **more: stock(*args, **more)
    with pytest.raises(UsageError, match=r"blocks.1.attn does not run its class's forward"):
        ultrazoo.apply(model, recipe("full"))
    assert "processor" not in model.blocks[0].attn._modules
    del model.blocks[1].attn.forward
    ultrazoo.apply(model, recipe("full"))
    with pytest.raises(UsageError, match="runs a recipe already"):
        ultrazoo.apply(model, recipe("full"))
    model.blocks[0].attn.forward = stock
    with pytest.raises(UsageError, match=r"blocks.0.attn: the recipe's processor was replaced"):
        model(image(model, GRIDS[0]))
    assert ultrazoo.remove(model) == ["blocks.0.attn", "blocks.1.attn"]
