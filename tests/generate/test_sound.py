"""Pipelines that make sound with their pictures: it is saved with the latents, decoded by their own parts, and in the file."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch

from tests.generate.test_generate import FULL, ORIGINAL, direct, family_of, latents_of, quiet, recipe, wanted
from tests.generate.tiny_pipelines import MAKERS, pipeline_folder
from ultrazoo.errors import RecipeError, UsageError
from ultrazoo.generate import media
from ultrazoo.generate.families import BY_PIPELINE
from ultrazoo.generate.latents import Latents
from ultrazoo.generate.run import generate, resume

pytestmark = pytest.mark.filterwarnings("ignore")

LOUD = [name for name in MAKERS if BY_PIPELINE[name].audio]


@pytest.fixture(scope="module", params=LOUD)
def folder(request, tmp_path_factory):
    return pipeline_folder(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


def written(monkeypatch):
    """Filled with the sound and its rate that go to the encoder of a file."""
    seen = []
    write = media.write_video

    def noted(path, frames, fps, note, audio=None, force=False):
        seen.append(audio)
        write(path, frames, fps, note, audio, force)

    monkeypatch.setattr(media, "write_video", noted)
    return seen


def test_the_sound_is_the_pipelines_own(folder, tmp_path, monkeypatch):
    import diffusers

    heard: list[torch.Tensor] = []
    cls = getattr(diffusers, folder.name)
    seen = written(monkeypatch)
    with monkeypatch.context() as patch:
        call = cls.__call__

        def kept(self, *args, **more):
            out = call(self, *args, **more)
            heard.append(out.audio if hasattr(out, "audio") else out.values["audio"])
            return out

        patch.setattr(cls, "__call__", kept)
        direct(folder)
    due = heard[0][0].float().numpy()
    assert due.shape[0] == 2
    assert due.std() > 1e-4
    made = generate(recipe(folder, ORIGINAL), folder, wanted(tmp_path, folder), say=quiet)
    samples, rate = seen[0]
    assert samples.shape == due.shape
    assert np.abs(samples - due).max() <= 1e-4 * np.abs(due).max()
    # the sound lasts as long as the pictures, but for a latent of it
    assert abs(samples.shape[1] / rate - made.note["frames"] / family_of(folder).fps) < 0.1
    assert sound_in(made.out) == (rate, 2)


def sound_in(path):
    import av

    with av.open(str(path)) as container:
        (stream,) = container.streams.audio
        assert sum(frame.samples for frame in container.decode(stream)) > 0
        return stream.rate, stream.channels


def test_the_sound_is_kept_with_the_latents(folder, tmp_path, monkeypatch):
    seen = written(monkeypatch)
    made = generate(recipe(folder, FULL), folder, wanted(tmp_path, folder), say=quiet)
    assert Latents.load(made.latents).audio is not None
    assert torch.isfinite(latents_of(made)).all()
    resume(folder, made.latents, wanted(tmp_path, folder, "again"), say=quiet)
    assert np.array_equal(seen[0][0], seen[1][0])


@pytest.fixture(scope="module")
def h3(tmp_path_factory):
    name = "MiniMaxH3ModularPipeline"
    return pipeline_folder(name, tmp_path_factory.mktemp("pipelines") / name)


def test_minimax_h3_says_what_it_cannot_do(h3, tmp_path):
    size = {"width": 64, "height": 64}
    short = recipe(h3, FULL, video={**size, "frames": 107})
    with pytest.raises(UsageError, match="makes 120 to 360 frames and 107 are asked for"):
        generate(short, h3, wanted(tmp_path, h3), say=quiet)
    with pytest.raises(RecipeError, match="nearest legal: 124 or 141"):
        generate(recipe(h3, FULL, video={**size, "frames": 125}), h3, wanted(tmp_path, h3), say=quiet)
    guided = recipe(h3, FULL, sampling={"steps": 3, "guidance": 5.0})
    with pytest.raises(UsageError, match="guidance of MiniMaxH3Transformer3DModel is in its weights"):
        generate(guided, h3, wanted(tmp_path, h3), say=quiet)
    with pytest.raises(UsageError, match="no negative prompt"):
        generate(recipe(h3, FULL), h3, wanted(tmp_path, h3, negative="the sea"), say=quiet)
    assert not list(tmp_path.iterdir())


def forwards(monkeypatch, name):
    """Filled with the step, and the rows of the batch, of every forward of the diffusers class `name`."""
    import diffusers

    cls = getattr(diffusers, name)
    seen, forward = [], cls.forward

    @functools.wraps(forward)
    def counted(self, *args, **more):
        # pricing the plan, once in a process, runs a model of its own, without attentions
        if hasattr(self, "session"):
            seen.append((self.session.step, len(more["hidden_states"])))
        return forward(self, *args, **more)

    monkeypatch.setattr(cls, "forward", counted)
    return seen


def test_minimax_h3_makes_one_forward_a_step(h3, tmp_path, monkeypatch):
    seen = forwards(monkeypatch, "MiniMaxH3Transformer3DModel")
    generate(recipe(h3, FULL), h3, wanted(tmp_path, h3), say=quiet)
    assert seen == [((0, 3), 1), ((1, 3), 1), ((2, 3), 1)]


def test_guidance_of_one_is_none_in_ltx2(tmp_path, monkeypatch):
    place = pipeline_folder("LTX2Pipeline", tmp_path / "LTX2Pipeline")
    seen = forwards(monkeypatch, "LTX2VideoTransformer3DModel")
    for guidance, rows in ((1.0, [1]), (4.0, [2, 1, 1])):
        given = recipe(place, FULL, sampling={"steps": 2, "guidance": guidance})
        generate(given, place, wanted(tmp_path, place, f"at{guidance:g}"), say=quiet)
        assert seen == [((step, 2), count) for step in (0, 1) for count in rows]
        seen.clear()


def test_a_modular_index_that_names_another_place_is_read_here(h3, tmp_path):
    """As downloaded: its index names the hub, and a transformer for references that is not here."""
    place = tmp_path / "MiniMaxH3ModularPipeline"
    shutil.copytree(h3, place)
    index = place / "modular_model_index.json"
    content = json.loads(index.read_text())
    for row in content.values():
        if isinstance(row, list):
            row[2]["pretrained_model_name_or_path"] = "MiniMaxAI/MiniMax-H3"
    content["transformer_ref"] = ["diffusers", "MiniMaxH3Transformer3DModel", content["transformer"][2]]
    index.write_text(json.dumps(content))
    (tmp_path / "a").mkdir()
    made = generate(recipe(h3, FULL), place, wanted(tmp_path / "a", h3), say=quiet)
    due = generate(recipe(h3, FULL), h3, wanted(tmp_path / "a", h3, "due"), say=quiet)
    assert torch.equal(latents_of(made), latents_of(due))
    content["vae"][2]["type_hint"] = ["subprocess", "Popen"]
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="it names vae from 'subprocess'"):
        generate(recipe(h3, FULL), place, wanted(tmp_path / "a", h3, "not"), say=quiet)
