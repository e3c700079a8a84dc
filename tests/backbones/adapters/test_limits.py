"""What models of diffusers can be run with: default settings plan, hidden limits are problems of `check` and never later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ultrazoo
from tests.backbones.adapters.tiny import TINY, made
from ultrazoo.backbones.diffusers import ADAPTERS, adapter_named
from ultrazoo.errors import RecipeError
from ultrazoo.grid import Grid

pytestmark = pytest.mark.filterwarnings("ignore")

PIXART, COGVIDEOX = "PixArtTransformer2DModel", "CogVideoXTransformer3DModel"
IMAGES = (PIXART, "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel")


def recipe(model: str, grid: tuple[int, int, int] = (1, 4, 6), config: Any = None, **more: Any) -> dict[str, Any]:
    backbone = {"name": "diffusers", "model": model, **({} if config is None else {"config": config}), **more}
    return {"name": "x", "backbone": backbone, "video": {"grid": list(grid)}, "attention": {"*": "full"}}


def problems(source: Any) -> list[tuple[str, str, str]]:
    """What `check` says; building says no less."""
    found = ultrazoo.check(source)
    if found:
        with pytest.raises(RecipeError):
            ultrazoo.plan(source)
    return [(one.path, one.rule, one.fix) for one in found]


@pytest.mark.parametrize("name", ADAPTERS)
def test_default_settings_plan(name):
    source = recipe(name, (1, 30, 45) if name in IMAGES else (7, 30, 45))
    if name == "ZImageTransformer2DModel":
        source["video"] = {"grid": [1, 30, 45]}
    assert problems(source) == []
    plan = ultrazoo.plan(source)
    # nothing is stored of a number that is the usual one
    assert "text_tokens" not in plan.resolved.data()["backbone"]


# resolution and aspect ratio


TINY_PIXART = {**TINY[PIXART].settings, "attention_head_dim": 24, "cross_attention_dim": 48}


@pytest.mark.parametrize(
    "changes", [{"sample_size": 128}, {"use_additional_conditions": True}, {"caption_channels": None}]
)
def test_pixart_is_run_with_what_its_settings_ask_for(changes):
    config = {**TINY_PIXART, **changes}
    source = recipe(PIXART, config=config)
    assert problems(source) == []
    model = made(PIXART, **config)
    assert ultrazoo.plan(source).totals.parameters == sum(p.numel() for p in model.parameters())
    report = ultrazoo.apply(model, {key: source[key] for key in ("name", "video", "attention")})
    assert len(report.models[0].replaced) == 2
    settings = {**dict(model.config), "use_additional_conditions": changes.get("use_additional_conditions")}
    given = adapter_named(PIXART).inputs(settings, Grid(1, 4, 6), 2, 7, torch.randn)
    shapes = {key: None if one is None else tuple(one.shape) for key, one in given["added_cond_kwargs"].items()}
    asked = model.use_additional_conditions
    assert shapes == ({"resolution": (2, 2), "aspect_ratio": (2, 1)} if asked else dict.fromkeys(shapes))
    with torch.no_grad():
        assert model(**given)[0].isfinite().all()


def test_pixart_settings_that_cannot_be():
    config = {**TINY[PIXART].settings, "cross_attention_dim": 1152, "sample_size": 128}
    assert problems(recipe(PIXART, config=config)) == [
        (
            "backbone.config.cross_attention_dim",
            "captions are projected to 32 channels, the cross-attention reads 1152",
            "write 32, or caption_channels: null",
        ),
        (
            "backbone.config.use_additional_conditions",
            "resolution and aspect ratio are embedded in thirds of 32 channels, which 3 does not divide",
            "write false, or other num_attention_heads and attention_head_dim; it is true at sample_size 128 if not given",
        ),
    ]
    assert (
        problems(recipe(PIXART, config=config | {"caption_channels": None, "use_additional_conditions": False})) == []
    )


# lengths of texts and sizes of tables


def test_cogvideox_counts_its_own_number_of_text_tokens():
    silent, said = recipe(COGVIDEOX, (13, 30, 45)), recipe(COGVIDEOX, (13, 30, 45), text_tokens=226)
    plans = [ultrazoo.plan(one) for one in (silent, said)]
    assert plans[0].hash == plans[1].hash
    assert [plan.resolved.sites[0].extra_tokens for plan in plans] == [226, 226]
    # the pipelines' size
    pixels = {**silent, "video": {"width": 720, "height": 480, "frames": 49}}
    assert ultrazoo.plan(pixels).resolved.grid == (13, 30, 45)


def test_another_number_of_text_tokens_is_a_problem():
    rule = "512 text tokens, and positions are added to text and video together for exactly 226 of text"
    due = [("backbone.text_tokens", rule, "write 226, or leave it out")]
    assert problems(recipe(COGVIDEOX, (13, 30, 45), text_tokens=512)) == due
    # known before the grid is
    assert problems(recipe(COGVIDEOX, (1, 1, 1), text_tokens=512)) == due
    # a rotary embedding takes any
    turned = {"use_rotary_positional_embeddings": True}
    assert problems(recipe(COGVIDEOX, (2, 4, 6), turned, text_tokens=512)) == []


def test_a_loaded_cogvideox_needs_no_number():
    changes = {"use_rotary_positional_embeddings": False}
    model = made(COGVIDEOX, **changes)
    report = ultrazoo.apply(model, {"name": "x", "video": {"grid": [2, 4, 6]}, "attention": {"*": "full"}})
    assert report.plan.resolved.sites[0].extra_tokens == TINY[COGVIDEOX].settings["max_text_seq_length"]


def test_the_usual_number_means_the_same_model_as_none():
    name = "WanTransformer3DModel"
    hashes = [
        ultrazoo.plan(recipe(name, (2, 4, 6), TINY[name].settings, **more)).hash
        for more in ({}, {"text_tokens": 512}, {"text_tokens": 77})
    ]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


LIMITS = [
    ("ZImageTransformer2DModel", (1, 4, 6), {"text_tokens": 1000}, "config.axes_lens"),
    ("ZImageTransformer2DModel", (1, 513, 4), {}, "config.axes_lens"),
    ("Kandinsky6Transformer3DModel", (1, 129, 4), {}, ""),
    ("Kandinsky6Transformer3DModel", (1, 4, 6), {"text_tokens": 2049}, "text_tokens"),
    ("QwenImageTransformer2DModel", (1, 4, 6), {"text_tokens": 4094}, "text_tokens"),
    ("SD3Transformer2DModel", (1, 97, 4), {}, "config.pos_embed_max_size"),
    ("WanTransformer3DModel", (1, 1025, 2), {}, "config.rope_max_seq_len"),
    ("SanaVideoTransformer3DModel", (1, 2, 1025), {}, "config.rope_max_seq_len"),
]


@pytest.mark.parametrize(("name", "grid", "more", "path"), LIMITS)
def test_tables_that_are_too_short_are_problems(name, grid, more, path):
    found = problems(recipe(name, grid, **more))
    assert [one[0] for one in found] == [f"backbone.{path}".rstrip(".")]
    assert found[0][2]


@pytest.mark.parametrize("text", [992, 993])
def test_the_limit_of_z_image_is_where_the_model_has_it(text):
    name = "ZImageTransformer2DModel"
    settings = {**TINY[name].settings, "axes_lens": [994, 32, 32]}
    assert (problems(recipe(name, (1, 4, 8), settings, text_tokens=text)) == []) == (text == 992)
    given = adapter_named(name).inputs({**dict(made(name).config), **settings}, Grid(1, 4, 8), 1, text, torch.randn)
    model = made(name, **settings)
    with torch.no_grad():
        if text == 992:
            assert model(**given)[0][0].isfinite().all()
        else:
            with pytest.raises(IndexError):
                model(**given)


def test_z_image_counts_no_more_text_than_its_tables_hold():
    name = "ZImageTransformer2DModel"
    settings = {**TINY[name].settings, "axes_lens": [256, 32, 32]}
    plan = ultrazoo.plan(recipe(name, (1, 4, 8), settings))
    assert plan.resolved.sites[0].extra_tokens == 224


# whatever else a library says


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_layers": None}, "settings that PixArtTransformer2DModel cannot have: TypeError"),
        ({"norm_type": "x"}, "PixArtTransformer2DModel cannot be made with these settings: NotImplementedError"),
        ({"num_attention_heads": 0}, "PixArtTransformer2DModel"),
    ],
)
def test_a_model_that_its_library_cannot_make_is_a_problem(config, says):
    found = problems(recipe(PIXART, config=config))
    assert [one[0] for one in found] == ["backbone.config"]
    assert says in found[0][1]


def test_a_forward_that_fails_is_a_problem_with_its_size():
    config = {**TINY[COGVIDEOX].settings, "use_learned_positional_embeddings": True}
    assert problems(recipe(COGVIDEOX, (3, 4, 6), config)) == []
    found = problems(recipe(COGVIDEOX, (3, 5, 7), config))
    assert [one[0] for one in found] == ["backbone.config"]
    assert "own forward fails at grid (3, 5, 7) with 7 text tokens: ValueError" in found[0][1]
