"""Packed rows: which of them are the grid, what is refused, and heads that turn by frequencies of their own."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import ultrazoo
from tests.backbones.adapters.packed import by_coordinates, ltx_places, places
from tests.backbones.adapters.test_parity import recipe, run, worst
from tests.backbones.adapters.tiny import TINY, arguments, made
from ultrazoo.attention.contract import grid_positions
from ultrazoo.backbones.diffusers import adapter_named
from ultrazoo.backbones.diffusers.packed import rasters
from ultrazoo.backbones.diffusers.spec import _defaults, diffusers_class
from ultrazoo.errors import UsageError
from ultrazoo.grid import Grid

LTX = "LTXVideoTransformer3DModel"
LTX2 = "LTX2VideoTransformer3DModel"


def _signature(name: str) -> dict[str, object]:
    """Defaults of the arguments of a forward."""
    return {k: p.default for k, p in inspect.signature(diffusers_class(name).forward).parameters.items()}


def axis(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 4, 6), (3, 1, 1), (3, 5, 1), (3, 1, 7), (4, 5, 7)])
def test_a_grid_is_read_from_its_coordinates(grid):
    axes = [torch.arange(n, dtype=torch.float64) ** 1.5 + 0.1 * i for i, n in enumerate(grid)]
    (found,) = rasters(places(*axes))
    assert (found.start, found.grid) == (0, grid)
    assert all(torch.equal(one, due) for one, due in zip(found.axes, axes, strict=True))


def test_frames_of_another_size_or_time_begin_another_run():
    clip = places(axis(0, 1.5, 3), axis(-1, 0, 1), axis(0, 0.5))
    same_time, smaller = places(axis(0), axis(-1, 0, 1), axis(0, 0.5)), places(axis(9), axis(0, 1), axis(0, 0.5))
    found = rasters(torch.cat([same_time, clip, smaller, smaller[:3], clip]))
    assert [(one.start, one.grid) for one in found] == [
        (0, (1, 3, 2)),
        (6, (3, 3, 2)),
        (24, (1, 2, 2)),
        (31, (3, 3, 2)),
    ]


def test_by_head_rotates_each_head_by_its_own_frequencies():
    """Mechanisms that rotate through the host once more do so after heads were picked."""
    model = made(LTX)
    given = arguments(LTX, "plain", (2, 4, 6))
    ultrazoo.apply(model, recipe(LTX, {"name": "by_head", "groups": {"0": {"name": "full"}, "1": {"name": "full"}}}))
    seen = []
    for module in model.modules():
        if hasattr(module, "installed"):
            original = module.attention.forward
            module.attention.forward = lambda x, host, call, do=original: (seen.append(host), do(x, host, call))[1]
    with torch.no_grad():
        run(model, given)
    host, z = seen[0], torch.randn(2, 48, 2, 16)
    at = grid_positions((2, 4, 6))
    whole = host.rotate(z, at)
    assert torch.equal(host.rotate_heads(z[:, :, 1:], at, (1,)), whole[:, :, 1:])
    assert not torch.allclose(host.rotate_heads(z[:, :, 1:], at, (0,)), whole[:, :, 1:], atol=1e-2), "null test"


def test_physical_rotation_is_the_published_formula():
    """Row, head and pair one by one, in fp64, at coordinates small enough for exact angles."""
    model = made(LTX)
    ultrazoo.apply(model, recipe(LTX, "full"))
    seen = []
    block = model.transformer_blocks[0].attn1.processor
    original = block.attention.forward
    block.attention.forward = lambda x, host, call: (seen.append(host), original(x, host, call))[1]
    with torch.no_grad():
        run(model, arguments(LTX, "plain", (2, 4, 6)))
    host, z = seen[0], torch.randn(1, 48, 2, 16, dtype=torch.float64)
    found = host.rotate(z, grid_positions((2, 4, 6)))
    due = z.clone()
    for row in range(48):
        t, h, w = row // 24, row // 6 % 4, row % 6
        share = (t * 8 / 25 / 20, h * 32 / 2048, w * 32 / 2048)
        for pair in range(16):
            if pair == 0:
                # 32 channels are 5 frequencies for each of 3 axes, and a pair that does not turn
                continue
            place, which = divmod(pair - 1, 3)
            angle = (2 * share[which] - 1) * math.pi / 2 * 10000 ** (place / 4)
            head, at = divmod(2 * pair, 16)
            a, b = z[0, row, head, at], z[0, row, head, at + 1]
            due[0, row, head, at] = a * math.cos(angle) - b * math.sin(angle)
            due[0, row, head, at + 1] = a * math.sin(angle) + b * math.cos(angle)
    # fp32 angles of up to 15708 radians are known to a thousandth
    assert (found - due).abs().max() < 5e-3
    assert (found - z).abs().max() > 1, "null test"


def test_rows_that_are_no_grid_are_refused():
    model = made(LTX)
    ultrazoo.apply(model, recipe(LTX, "full"))
    given, grid = arguments(LTX, "plain", (2, 4, 6)), Grid(2, 4, 6)
    rows = ltx_places(grid)
    moved = by_coordinates(given, grid, rows)
    moved["video_coords"] = torch.stack([rows.T, rows.T + 1])
    with pytest.raises(UsageError, match="different coordinates"):
        model(**moved)
    ragged = torch.stack([torch.zeros(48), torch.arange(48) // 5, torch.arange(48) % 5], dim=1)
    with pytest.raises(UsageError, match="of 48 rows at most 0 lie on a"):
        model(**by_coordinates(given, grid, ragged))
    with pytest.raises(UsageError, match="of 48 rows at most"):
        model(**by_coordinates(given, grid, rows[torch.randperm(48)]))
    with pytest.raises(UsageError, match="give num_frames"):
        model(**{**given, "height": None})
    with pytest.raises(UsageError, match="got 48 tokens for grid"):
        model(**{**given, "num_frames": 3})
    # a null test: the calls above fail for what was changed in them
    ultrazoo.remove(model)
    with torch.no_grad():
        due = run(model, given)
        ultrazoo.apply(model, recipe(LTX, "full"))
        assert worst(run(model, given), due) <= 1e-5


OLD = {
    "rope_type": "interleaved",
    "gated_attn": False,
    "cross_attn_mod": False,
    "audio_gated_attn": False,
    "audio_cross_attn_mod": False,
    "perturbed_attn": False,
}


@pytest.mark.parametrize("variant", ["plain", "keyframe", "hidden rows"])
@pytest.mark.parametrize(
    "changes",
    [
        OLD,
        {"gated_attn": False},
        {"perturbed_attn": False},
        {"rope_type": "interleaved", "attention_head_dim": 20, "cross_attention_dim": 40},
        {"rope_double_precision": False, "rope_theta": 500.0, "causal_offset": 0},
        {"patch_size": 2, "patch_size_t": 2, "vae_scale_factors": (4, 16, 16), "timestep_scale_multiplier": 500},
        {"use_prompt_adaln_single": False, "use_keyframes_abs_pos_embedding": True, "use_prompt_embeddings": False},
    ],
    ids=["LTX-2.0", "no gates", "not perturbed", "left over channels", "fp32", "patches", "LTX-2.5"],
)
def test_every_generation_of_ltx2_is_the_same_model(changes, variant):
    model = made(LTX2, **changes)
    given = arguments(LTX2, variant, (3, 5, 7), **changes)
    if "patch_size" in changes and variant != "plain":
        # bounds of patches of 2 differ from those that the variant makes, so they alone say the grid
        given |= {"num_frames": None, "height": None, "width": None}
    with torch.no_grad():
        due = run(model, given)
        ultrazoo.apply(model, recipe(LTX2, "full"))
        assert worst(run(model, given), due) <= 1e-5


def test_timesteps_of_the_grid_are_on_one_scale():
    changes = {"timestep_scale_multiplier": 500}
    for given in (arguments(LTX2, "keyframe", (2, 4, 6)), arguments(LTX2, "plain", (2, 4, 6))):
        settings = {**_defaults(LTX2), **TINY[LTX2].settings, **changes}
        frame = adapter_named(LTX2).frame(settings, {**_signature(LTX2), **given})
        assert frame.timestep.shape in ((2,), (2, 48))
        assert torch.equal(frame.timestep.flatten(), given["timestep"].reshape(2, -1)[:, :48].flatten() * 2)


def test_masks_between_tokens_are_refused_and_kept_by_the_models_own_attention():
    model = made(LTX2)
    given = arguments(LTX2, "keyframe", (2, 4, 6))
    mask = torch.ones(2, 72, 72)
    mask[:, 48:, :48] = 0
    masked = {**given, "video_self_attention_mask": mask}
    with torch.no_grad():
        due = run(model, masked)
        ultrazoo.apply(model, recipe(LTX2, "original"))
        assert worst(run(model, masked), due) == 0
        ultrazoo.remove(model)
        ultrazoo.apply(model, recipe(LTX2, "full"))
        for wrong in (mask, torch.full((2, 72, 72), 0.5)):
            with pytest.raises(UsageError, match="differs between queries, or weakens"):
                model(**{**given, "video_self_attention_mask": wrong})
        whole = {**given, "video_self_attention_mask": torch.ones(2, 72, 72)}
        assert worst(run(model, whole), run(model, given)) == 0


def test_coordinates_of_another_grid_are_refused():
    model = made(LTX2)
    ultrazoo.apply(model, recipe(LTX2, "full"))
    given = arguments(LTX2, "keyframe", (2, 4, 6))
    with pytest.raises(UsageError, match="first 48 rows of video_coords are not the grid"):
        model(**{**given, "height": 6, "width": 4})
    with pytest.raises(UsageError, match="give num_frames"):
        model(**{**given, "video_coords": None, "height": None})
