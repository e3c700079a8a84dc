"""MiniMax-H3: the layout that we make is the pipeline's, the grid is found in it, its sizes are those the VAE can make."""

from __future__ import annotations

import pytest
import torch

import ultrazoo
from tests.backbones.adapters.packed import h3_laid_out, h3_rows
from tests.backbones.adapters.test_parity import recipe, run, worst
from tests.backbones.adapters.tiny import TINY, arguments, made
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.backbones.diffusers import adapter_named
from ultrazoo.backbones.diffusers.minimax_h3 import GroupedGeometry, clip
from ultrazoo.backbones.diffusers.packed import Run
from ultrazoo.backbones.diffusers.processor import Processor
from ultrazoo.backbones.diffusers.spec import _defaults
from ultrazoo.errors import UsageError
from ultrazoo.grid import Grid
from ultrazoo.spec import Video

H3 = "MiniMaxH3Transformer3DModel"
SETTINGS = {**_defaults(H3), **TINY[H3].settings}


def frame(given):
    return adapter_named(H3).frame(SETTINGS, given)


def test_the_layout_is_the_pipelines():
    from diffusers.modular_pipelines.minimax_h3 import before_denoise as theirs
    from diffusers.modular_pipelines.minimax_h3.modular_pipeline import audio_latent_num_frames

    grid = Grid(7, 5, 9)
    ours = arguments(H3, "plain", tuple(grid))
    sound = audio_latent_num_frames(22)
    made_by_them = theirs.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(7, dtype=torch.long), 7, 10, 18, sound, (1, 2, 2), 2, 2, 0
    )
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    for name, due in zip(names, made_by_them, strict=False):
        assert torch.allclose(ours[name].double(), due.double(), rtol=0, atol=1e-12), name
    # the pipeline's own keyframes, of which one has the time of the clip's first frame
    places, tags, video, audio, text, _, _ = theirs.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(7, dtype=torch.long), 7, 10, 18, sound, (1, 2, 2), 2, 2, 0, ("first", "last")
    )
    given = {
        **ours,
        "position_ids": places,
        "token_tags": tags,
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }
    found = frame(given)
    start = len(tags) - grid.tokens
    assert (found.grid, found.start) == (tuple(grid), start)
    keyframes = (Run("reference", 7, 52, Grid(1, 5, 9)), Run("reference", 52, 97, Grid(1, 5, 9)))
    assert found.own.runs == (Run("text", 0, 7), *keyframes, Run("audio", 97, start))


def test_references_of_the_pipeline_lie_beside_the_grid():
    found = frame(arguments(H3, "references", (3, 5, 7)))
    assert found.grid == (3, 5, 7)
    assert [(run.kind, run.stop - run.start, run.grid) for run in found.own.runs] == [
        ("text", 7, None),
        ("audio", 6, None),
        ("reference", 12, (2, 3, 2)),
        ("reference", 4, (1, 2, 2)),
        ("audio", 30, None),
    ]
    unnamed = frame(arguments(H3, "picture in prompt", (3, 5, 7))).own.runs
    assert [run.kind for run in unnamed] == ["text", "audio", "unnamed"]


def test_timesteps_count_down_from_pure_noise():
    given = arguments(H3, "keyframes", (2, 4, 6))
    assert torch.allclose(frame(given).timestep, torch.full((2,), 800.0))
    rows = arguments(H3, "per token", (2, 4, 6))
    found = frame(rows).timestep
    assert found.shape == (2, 48)
    due = [(1 - (row % 9) / 8) * 1000 for row in range(len(rows["token_tags"]) - 48, len(rows["token_tags"]))]
    assert torch.allclose(found, torch.tensor(due).expand(2, 48), atol=1e-3)


def test_layouts_without_a_grid_are_refused():
    model = made(H3)
    given = arguments(H3, "plain", (2, 4, 6))
    text, audio, video = h3_rows(given)
    with torch.no_grad():
        due = run(model, given)
        ultrazoo.apply(model, recipe(H3, "full"))
        shuffled = video[1][torch.randperm(48)]
        with pytest.raises(UsageError, match=r"of the last 48 video rows in a row, \d+ at the end lie on a"):
            model(**h3_laid_out(given, text, audio, ("video", shuffled)))
        with pytest.raises(UsageError, match="of the last 48 video rows in a row, 0 at the end"):
            model(**h3_laid_out(given, text, audio, ("video", video[1].roll(1, 0))))
        with pytest.raises(UsageError, match="video_indices must rise"):
            model(**{**given, "video_indices": given["video_indices"].flip(0)})
        # a null test: the layout itself is served
        assert worst(run(model, given), due) <= 1e-5
    processor = next(one for one in model.modules() if isinstance(one, Processor))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    with pytest.raises(UsageError, match="attention mask over the visual tokens"):
        processor(model.transformer_blocks[0].attn, torch.zeros(2, 9, 24), None, mask)


def test_frames_are_those_of_the_pipeline():
    from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as theirs

    geometry = GroupedGeometry((4, 16, 16), (1, 2, 2), causal=True)
    legal = [n for n in range(1, 370) if geometry.grid(Video(width=64, height=64, frames=n))[0] is not None]
    # five frames alone are half an overlap: their VAE decodes nothing of them
    assert legal == sorted({theirs.align_num_frames(n, 17, 5) for n in range(6, 363)})
    for frames in legal:
        grid, _ = geometry.grid(Video(width=96, height=64, frames=frames))
        assert grid == Grid(theirs.video_latent_num_frames(frames, 17, 5), 2, 3)
        assert geometry.pixels(grid) == (96, 64, frames)
    _, (problem,) = geometry.grid(Video(width=64, height=64, frames=100))
    assert "nearest legal: 90 or 107" in str(problem)
    _, (problem,) = geometry.grid(Video(width=64, height=64, frames=5))
    assert "nearest legal: 22" in str(problem)


def test_a_window_is_another_model_for_the_video_alone():
    """What windows change first are rows of the grid: rows beside it see everything, as before."""
    model = made(H3)
    given = arguments(H3, "references", (2, 4, 6))
    seen: list[torch.Tensor] = []
    model.transformer_blocks[0].attn.register_forward_hook(lambda _, __, output: seen.append(output))
    near = {"name": "branched", "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}}}}
    with torch.no_grad():
        run(model, given)
        ultrazoo.apply(model, recipe(H3, near))
        run(model, given)
    due, found = seen
    beside = found.shape[1] - 48
    assert worst([found[:, :beside]], [due[:, :beside]]) <= 1e-5
    assert worst([found[:, beside:]], [due[:, beside:]]) > 1e-2


def test_references_whose_rows_are_no_frames_are_one_run():
    given = arguments(H3, "references", (3, 5, 7))
    text, audio, video = h3_rows(arguments(H3, "plain", (3, 5, 7)))
    places = torch.cat([clip(Grid(2, 3, 2), 7.0), torch.tensor([[30.0, 1, 1], [30.0, 5, 2], [30.0, 9, 7]])])
    found = frame(h3_laid_out(given, text, ("video", places), audio, video)).own.runs
    assert [(run.kind, run.stop - run.start, run.grid) for run in found][1] == ("reference", 15, None)


def test_rows_of_a_reference_clip_are_sparse_and_those_of_a_picture_are_not(monkeypatch):
    """SubBlock gives the pattern to the twelve rows of the clip; pictures, text and sound see everything."""
    seen = []
    problems = BlockSparseSpec.problems
    monkeypatch.setattr(BlockSparseSpec, "problems", lambda self, site: seen.append(site.extra) or problems(self, site))
    model = made(H3)
    given = arguments(H3, "references", (2, 4, 6))
    ultrazoo.apply(model, recipe(H3, {"name": "subblock", "block": 4, "runs": [2, 2], "multiple": 1}))
    seen.clear()
    with torch.no_grad():
        run(model, given)
    (segments,) = set(seen)
    kept = [(one.kind, one.length, one.rows, one.keys) for one in segments]
    assert kept == [
        ("text", 7, "dense", "compete"),
        ("audio", 6, "dense", "compete"),
        ("reference", 12, "pattern", "compete"),
        ("reference", 4, "dense", "compete"),
        ("audio", 16, "dense", "compete"),
    ]
