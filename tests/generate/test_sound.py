"""Pipelines that make sound with their pictures: it is saved with the latents, decoded by their own parts, and in the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.generate.test_generate import FULL, ORIGINAL, direct, family_of, latents_of, quiet, recipe, wanted
from tests.generate.tiny_pipelines import MAKERS, pipeline_folder
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
