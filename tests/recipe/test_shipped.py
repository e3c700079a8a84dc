"""The recipes that ship: checked at full size, saying what published facts say, built tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backbones.adapters.tiny import TINY, tensors_of
from tests.recipe.samples import problems_of, resolved
from ultrazoo import assemble, recipe
from ultrazoo.backbones.adapted import AdaptedSpec
from ultrazoo.grid import Grid
from ultrazoo.recipe import text

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
WANTED = {
    *("ultragen_4k", "ultragen_1080p", "ultragen_1080p_released", "ultragen_4k_released", "wan_1_3b_480p"),
    *("wan_1_3b_4k_full", "dit_xl_2_256", "ultragen_tiny", "dit_tiny"),
}


def test_all_are_there() -> None:
    assert set(NAMES) >= WANTED


@pytest.mark.parametrize("name", NAMES)
def test_checked_at_full_size(name: str) -> None:
    assert problems_of(name) == []
    written = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert recipe.load(name).name == name
    assert "Published" in written
    assert "Our choice" in written


@pytest.mark.parametrize("name", NAMES)
def test_resolved_recipes_load_back(name: str) -> None:
    one = resolved(name)
    again = resolved(one.data())
    assert again.hash == one.hash
    assert again.attention == one.attention
    assert again.data() == one.data()
    written = recipe.resolve(recipe.load(text.read(recipe.write(one.data()), "recipe.yaml")))
    assert written.hash == one.hash
    assert recipe.make_plan(again).totals == recipe.make_plan(one).totals


@pytest.mark.parametrize(
    ("name", "tokens", "speedup"),
    [
        ("ultragen_4k", 685_440, 15.05),
        ("ultragen_4k_released", 8 * 135 * 240, 3.95),
        ("wan_1_3b_480p", 32_760, 1.0),
        ("wan_1_3b_4k_full", 685_440, 1.0),
        ("ultragen_1080p", 171_360, 15.04),
        ("dit_xl_2_256", 256, 1.0),
    ],
)
def test_published_facts(name: str, tokens: int, speedup: float) -> None:
    plan = recipe.make_plan(resolved(name))
    assert plan.grid.tokens == tokens
    assert plan.totals.attention_speedup == pytest.approx(speedup, abs=0.005)


def test_layers_of_the_paper_and_of_the_released_code() -> None:
    plan = recipe.make_plan(resolved("ultragen_4k"))
    full = recipe.make_plan(resolved("wan_1_3b_4k_full")).layers[0].attention_flops
    even, odd = (full / plan.layers[layer].attention_flops for layer in (0, 1))
    assert (even, odd) == (pytest.approx(12.19, abs=0.005), pytest.approx(19.66, abs=0.005))
    assert plan.clip.forwards == 60
    assert recipe.make_plan(resolved("wan_1_3b_4k_full")).totals.attention_flops == pytest.approx(86.6e15, rel=1e-3)
    released = resolved("ultragen_1080p_released")
    assert [i for i, spec in enumerate(released.attention) if spec.name == "full"] == [0, 1, 2, 27, 28, 29]


SMALLER = {
    "wan": [
        *(
            "backbone.dim=96",
            "backbone.heads=4",
            "backbone.ffn_dim=64",
            "backbone.text_dim=16",
            "backbone.text_tokens=4",
        ),
        *("backbone.time_dim=8", "backbone.layers=8", "video.grid=[3, 9, 10]", "dtype=float32"),
    ],
    "dit": ["backbone.dim=48", "backbone.heads=4", "backbone.layers=4", "video.grid=[1, 6, 8]", "dtype=float32"],
    # and the settings of the adapters' tests
    "diffusers": ["backbone.text_tokens=4", "video.grid=[3, 9, 10]", "dtype=float32"],
    "timm": [
        "backbone.config={embed_dim: 32, depth: 2, num_heads: 2, num_classes: 5}",
        *("video.grid=[1, 9, 10]", "dtype=float32"),
    ],
}
# at three latent frames a window over chunks of frames holds everything, and what lies beyond it takes no part
LONGER = {"delta_tiny": ["video.grid=[7, 4, 5]"], "delta_wan_480p": ["video.grid=[13, 4, 5]"]}
# a published table of windows belongs to one grid: the small build takes the rule for other sizes
FITTING = {
    # sizes that fit frames of 90 tokens, and a factor that is a threshold of the same 0.33 at 270 tokens
    "radial_minimax_h3_768p": ["attention.*.block=32", "attention.*.width=32"],
    "radial_wan_14b_768p": ["attention.*.block=32", "attention.*.width=32"],
    "skip_softmax_wan_14b_720p": ["attention.*.scale_factor=90"],
    # a training grid and sizes of windows, tiles and strides that are smaller than a grid of (3, 9, 10)
    "dinov3_large_2048": ["attention.odd.kernel_size=[1, 3, 5]"],
    "flux2_dev_2048": ["video.grid=[1, 9, 10]", "attention.single:*.kernel_size=[1, 3, 5]"],
    "z_image_2048": ["video.grid=[1, 9, 10]", "attention.*.kernel_size=[1, 3, 5]"],
    "atlasvid_wan_14b_4k": ["backbone.trained=[2, 4, 5]"],
    "freeswim_wan_1_3b_1080p": ["attention.*.trained=[4, 6]"],
    "neighborhood_wan_14b_768p": ["attention.*.kernel_size=[3, 4, 6]", "attention.*.stride=[2, 2, 2]"],
    "sliding_tile_wan_14b_768p": ["attention.*.tile=[2, 2, 2]"],
    "t3_4k_wan_1_3b": ["attention.*.table=auto"],
    "t3_4k_wan_5b": ["attention.*.table=auto"],
}

# where a recipe names layers by number, they stay
DEEPER = {"kv_compress_1024": ["backbone.layers=28"], "z_image_2048": ["backbone.config.n_layers=9"]}


def outputs_of(model: torch.nn.Module, spec: Any, grid: Grid) -> list[torch.Tensor]:
    if isinstance(spec, AdaptedSpec):
        found = model(**spec.adapter().inputs(spec.settings(), grid, 2, spec.text_tokens, torch.randn))
        # some models return a list of samples
        tensors = tensors_of(found)
        return [torch.stack(tensors)] if not isinstance(found, torch.Tensor) and isinstance(found[0], list) else tensors
    wan = spec.name == "wan"
    x = torch.randn(2, spec.channels if wan else spec.latent.channels, *spec.geometry.latent(grid))
    rest = torch.randn(2, 4, spec.text_dim) if wan else torch.tensor([1, 2])
    return [model(x, torch.tensor([100.0, 900.0]), rest)]


def forward_and_backward(model: torch.nn.Module) -> None:
    """Run a batch of two; every parameter that trains takes part once what starts at zero does not.

    Where a recipe has steps, it is the last one: the first are dense.
    """
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if model.plan.resolved.steps:
        count = model.plan.resolved.sampling.steps
        model.select(count - 1, count)
    outputs = outputs_of(model, model.plan.resolved.backbone, model.plan.grid)
    for out in outputs:
        assert out.isfinite().all()
        assert out.shape[0] == 2
    sum(out.square().mean() for out in outputs).backward()
    training = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    idle = [name for name, p in training if p.grad is None or not p.grad.isfinite().all()]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
def test_built_smaller(name: str) -> None:
    spec = resolved(name).backbone
    smaller = SMALLER[spec.name]
    if spec.name == "diffusers":
        smaller = [*smaller, f"backbone.config={json.dumps(TINY[spec.model].settings)}"]
    more = [*LONGER.get(name, []), *FITTING.get(name, []), *DEEPER.get(name, [])]
    model = assemble.build(name, *smaller, *more)
    assert sum(p.numel() for p in model.parameters()) == model.plan.totals.parameters
    forward_and_backward(model)


@pytest.mark.parametrize("name", ["ultragen_tiny", "dit_tiny"])
def test_the_tiny_ones_run_as_they_are(name: str) -> None:
    forward_and_backward(assemble.build(name))
