"""What an adapter costs, and the native Wan beside diffusers': forwards of one model in three forms, in turn.

A Wan of the 1.3B model's width and two layers, 2880 tokens, batch 1, two threads: diffusers' own, a second one with the same
weights in which the recipe `full` runs through our adapter, and the native backbone `wan` with the same weights. A Qwen-Image of the
same width, 2880 tokens and 512 of text, stands for models whose text takes part in the attention. Ratios are medians over rounds of
the times within a round, since the speed of a shared machine drifts for all alike.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ultrazoo
from benchmarks.conftest import THREADS
from benchmarks.measure import Timing, interleaved
from benchmarks.rows import Row
from tests.backbones.models import diffusers_wan, randomise
from ultrazoo.attention.full import FullSpec
from ultrazoo.backbones.diffusers import adapter_named
from ultrazoo.backbones.wan import Wan, WanSpec
from ultrazoo.grid import Grid
from ultrazoo.testing import error_ratio

GRID, LAYERS, ROUNDS = Grid(3, 24, 40), 2, 9
JOINT_GRID = Grid(1, 48, 60)
JOINT = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": LAYERS,
    "attention_head_dim": 128,
    "num_attention_heads": 12,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
RECIPE = {"name": "full", "video": {"grid": list(GRID)}, "attention": {"*": "full"}}

ADAPTER = "through the adapter at most 1.05 of the original's time"
NATIVE = "native at most the original's time"


@pytest.fixture
def forms(request: pytest.FixtureRequest) -> dict[str, nn.Module]:
    """The same random weights as three models."""
    torch.manual_seed(0)
    native = Wan(WanSpec(layers=LAYERS), [FullSpec()] * LAYERS, GRID)
    randomise(native).eval().to(request.param)
    original, adapted = (diffusers_wan(native).eval().to(request.param) for _ in range(2))
    ultrazoo.apply(adapted, RECIPE)
    return {"original": original, "adapted": adapted, "native": native}


def _ratio(times: Mapping[str, Timing], name: str) -> float:
    pairs = zip(times[name].samples_s, times["original"].samples_s, strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def _numbers(times: Mapping[str, Timing], name: str, grid: Grid) -> dict[str, float | int | str]:
    return {
        "original_s": round(times["original"].median_s, 3),
        f"{name}_s": round(times[name].median_s, 3),
        "ratio": round(_ratio(times, name), 3),
        "spread_original": round(times["original"].spread, 2),
        f"spread_{name}": round(times[name].spread, 2),
        "tokens": math.prod(grid),
    }


def _inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, GRID.t, 2 * GRID.h, 2 * GRID.w, generator=generator)
    text = torch.randn(1, 512, 4096, generator=generator)
    return {
        "hidden_states": latents.to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text.to(dtype),
    }


def _gate(forms: dict[str, nn.Module], calls: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> str:
    """Error ratios of our two forms: in fp32 against the original; in 16 bits, as far from fp32 as the original is."""
    found = {name: call() for name, call in calls.items()}
    if dtype == torch.float32:
        errors = {name: error_ratio(found[name], found["original"]) for name in ("adapted", "native")}
        assert max(errors.values()) <= 1e-5, errors
        return ", ".join(f"{name} against the original {error:.1e}" for name, error in errors.items())
    # the same rounded weights in fp32
    wide = {name: value.to(dtype).float() for name, value in _inputs(torch.float32).items()}
    exact = copy.deepcopy(forms["original"]).float()(**wide, return_dict=False)[0]
    errors = {name: error_ratio(value.float(), exact) for name, value in found.items()}
    assert max(errors["adapted"], errors["native"]) <= 1.1 * errors["original"] < 0.2, errors
    return ", ".join(f"{name} against fp32 {error:.1e}" for name, error in errors.items())


@pytest.mark.parametrize("forms", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"], indirect=True)
def test_forward_of_wan_in_three_forms(forms: dict[str, Any], record: Callable[[Row], None], command: str) -> None:
    dtype = next(forms["original"].parameters()).dtype
    kwargs = _inputs(dtype)
    calls: dict[str, Callable[[], Tensor]] = {
        "original": lambda: forms["original"](**kwargs, return_dict=False)[0],
        "adapted": lambda: forms["adapted"](**kwargs, return_dict=False)[0],
        "native": lambda: forms["native"](*kwargs.values()),
    }
    with torch.inference_mode():
        gate = _gate(forms, calls, dtype)
        times = interleaved(calls, rounds=ROUNDS)

    ratios = {name: _ratio(times, name) for name in ("adapted", "native")}
    case = f"Wan, C 1536, {LAYERS} layers, grid {GRID}, {THREADS} threads"
    for name, target, most in (("adapted", ADAPTER, 1.05), ("native", NATIVE, 1.0)):
        numbers = _numbers(times, name, GRID)
        title = f"{case}: {'full through our adapter' if name == 'adapted' else 'native wan'} against diffusers'"
        kind = str(dtype).removeprefix("torch.")
        record(Row(title, "full", kind, gate, numbers, command, target, ratios[name] <= most, kernel="sdpa"))
    assert ratios["adapted"] <= 1.05, ratios
    assert ratios["native"] <= 1.0, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_of_qwen_image_through_the_adapter(
    dtype: torch.dtype, record: Callable[[Row], None], command: str
) -> None:
    torch.manual_seed(0)
    name = "QwenImageTransformer2DModel"
    original = getattr(diffusers, name)(**JOINT).eval()
    kwargs = adapter_named(name).inputs(original.config, JOINT_GRID, 1, 512, torch.randn)
    forms = {"original": original, "adapted": copy.deepcopy(original)}
    ultrazoo.apply(forms["adapted"], {**RECIPE, "video": {"grid": list(JOINT_GRID)}})
    with torch.inference_mode():
        exact = forms["original"](**kwargs)[0]
        same = error_ratio(forms["adapted"](**kwargs)[0], exact)
        assert same <= 1e-5
        kwargs = {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in kwargs.items()
        }
        calls = {key: functools.partial(model.to(dtype), **kwargs) for key, model in forms.items()}
        errors = {key: error_ratio(call()[0].float(), exact) for key, call in calls.items()}
        # what the original itself loses by rounding; in fp32 nothing, and the first gate has said it
        assert errors["adapted"] <= max(1e-5, 1.1 * errors["original"]) < 0.2, errors
        times = interleaved(calls, rounds=ROUNDS)
    gate = f"against the original in fp32 {same:.1e}"
    if dtype != torch.float32:
        gate += (
            f"; in {str(dtype).removeprefix('torch.')} {errors['adapted']:.1e}, the original {errors['original']:.1e}"
        )
    case = f"Qwen-Image, C 1536, {LAYERS} layers, grid {JOINT_GRID}, {THREADS} threads: full through our adapter against diffusers'"
    met = _ratio(times, "adapted") <= 1.05
    numbers = _numbers(times, "adapted", JOINT_GRID)
    record(Row(case, "full", str(dtype).removeprefix("torch."), gate, numbers, command, ADAPTER, met, kernel="sdpa"))
    assert met, numbers
