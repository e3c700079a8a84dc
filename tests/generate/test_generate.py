"""`generate` end to end, offline, on tiny random pipelines in the real layout on the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.generate.tiny_pipelines import MAKERS, pipeline_folder
from ultrazoo.errors import UltrazooError, UsageError
from ultrazoo.generate import media
from ultrazoo.generate.families import BY_PIPELINE, Request
from ultrazoo.generate.latents import Latents
from ultrazoo.generate.media import pixels, read_note
from ultrazoo.generate.run import generate, resume
from ultrazoo.generate.wanted import Made, Wanted

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a red ball rolls over the sea"
ORIGINAL = {"*": {"name": "original"}}
FULL = {"*": {"name": "full"}}
WINDOWS = {"*": {"name": "branched", "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}}}}}


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return pipeline_folder(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


@dataclass(frozen=True)
class Base:
    """Two runs of one seed that others are held against: `full` attention, and `near` windows with what was said."""

    full: Made
    near: Made
    said: list[str]


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: Any) -> Base:
    place = tmp_path_factory.mktemp("base")
    said: list[str] = []
    full = generate(recipe(folder, FULL), folder, wanted(place, folder, "full"), say=quiet)
    near = generate(recipe(folder, WINDOWS), folder, wanted(place, folder, "near"), say=said.append)
    return Base(full, near, said)


def family_of(folder: Path) -> Any:
    return BY_PIPELINE[folder.name]


def frames_of(family: Any) -> int:
    if family.lengths is not None:
        return 124
    return 9 if family.kind == "video" else 1


def recipe(folder: Path, attention: Any, **more: Any) -> dict[str, Any]:
    family = family_of(folder)
    video = {"width": 64, "height": 64, "frames": frames_of(family)}
    sampling = {"steps": 3} if family.distilled else {"steps": 3, "guidance": 4.0}
    return {"name": "tiny", "video": video, "sampling": sampling, "attention": attention, "dtype": "float32", **more}


def wanted(place: Path, folder: Path, name: str = "out", **more: Any) -> Wanted:
    suffix = ".mp4" if family_of(folder).kind == "video" else ".png"
    return Wanted(prompt=PROMPT, out=place / f"{name}{suffix}", **more)


def quiet(_: str) -> None:
    pass


def latents_of(made: Any) -> torch.Tensor:
    return Latents.load(made.latents).video[0]


def direct(folder: Path) -> np.ndarray:
    """What the pipeline makes by itself, without us: frames or an image, in [0, 1]."""
    import diffusers

    cls = getattr(diffusers, folder.name)
    if issubclass(cls, diffusers.ModularPipeline):
        pipeline = cls.from_pretrained(str(folder), local_files_only=True)
        pipeline.load_components(dtype=torch.float32, local_files_only=True)
    else:
        pipeline = cls.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
    family = family_of(folder)
    if family.guider:
        pipeline.guider = pipeline.guider.new(guidance_scale=4.0)
    arguments = family.arguments(Request(PROMPT, 64, 64, frames_of(family), 3, 4.0))
    with torch.no_grad():
        out = pipeline(**arguments, output_type="np", generator=torch.Generator().manual_seed(0))
    found = next(getattr(out, name) for name in ("frames", "images", "videos") if hasattr(out, name))
    return np.asarray(found[0])


def test_the_models_own_attention_gives_the_pipelines_own_picture(folder, tmp_path, monkeypatch):
    due = pixels(direct(folder)).astype(int)
    assert due.std() > 2
    written = frames_written(monkeypatch)
    for name, attention in (("original", ORIGINAL), ("full", FULL)):
        made = generate(recipe(folder, attention), folder, wanted(tmp_path, folder, name), say=quiet)
        assert shown(made.out).shape == due.shape
        # one step of rounding where fp32 sums differ
        assert np.abs(written[-1].astype(int) - due).max() <= 1


def frames_written(monkeypatch: Any) -> list[np.ndarray]:
    """Filled with what goes to the encoder of the file, which loses some of it."""
    seen: list[np.ndarray] = []

    def noting(write: Any) -> Any:
        def noted(path: Path, pictures: np.ndarray, *rest: Any, **more: Any) -> None:
            seen.append(pictures)
            write(path, pictures, *rest, **more)

        return noted

    for name in ("write_video", "write_image"):
        monkeypatch.setattr(f"ultrazoo.generate.media.{name}", noting(getattr(media, name)))
    return seen


def shown(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        from PIL import Image

        return np.asarray(Image.open(path))
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_recipe_changes_the_latents_and_a_seed_keeps_them(folder, base, tmp_path):
    same = generate(recipe(folder, FULL), folder, wanted(tmp_path, folder, "same"), say=quiet)
    other = generate(recipe(folder, FULL), folder, wanted(tmp_path, folder, "other", seed=1), say=quiet)
    full, near = base.full, base.near
    assert torch.equal(latents_of(full), latents_of(same))
    says = replace(wanted(tmp_path, folder, "says"), prompt="the sea of glass")
    told = generate(recipe(folder, FULL), folder, says, say=quiet)
    for changed in (other, near, told):
        assert not torch.allclose(latents_of(full), latents_of(changed), atol=1e-3)
    assert any(line.startswith("warning: branched needs tuning") for line in base.said)
    note = read_note(near.out)
    assert note["seed"] == 0
    assert note["prompt"] == PROMPT
    assert len(note["recipe_hash"]) == 64


def test_per_step_schedules_are_honoured(folder, base, tmp_path):
    steps = {"0-2": {"*": {"name": "full"}}}
    everywhere = generate(recipe(folder, WINDOWS, steps=steps), folder, wanted(tmp_path, folder, "all"), say=quiet)
    first = generate(
        recipe(folder, WINDOWS, steps={"0": {"*": {"name": "full"}}}), folder, wanted(tmp_path, folder, "1"), say=quiet
    )
    assert torch.equal(latents_of(everywhere), latents_of(base.full))
    for other in (base.full, base.near):
        assert not torch.allclose(latents_of(first), latents_of(other), atol=1e-4)


def test_decoding_goes_on_from_saved_latents(folder, base, tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("ultrazoo.generate.decoding.through", fails)
        with pytest.raises(UltrazooError, match=r"go on in tiles with: .*--from-latents"):
            generate(recipe(folder, FULL), folder, wanted(tmp_path, folder), say=quiet)
    first = wanted(tmp_path, folder)
    assert first.saved.is_file()
    assert not first.out.exists()
    later = resume(folder, first.saved, wanted(tmp_path, folder), say=quiet)
    assert np.array_equal(shown(later.out), shown(base.full.out))


def test_tiles_give_the_same_size(folder, tmp_path):
    made = generate(recipe(folder, FULL), folder, wanted(tmp_path, folder, tile="on"), say=quiet)
    assert made.tiled
    assert shown(made.out).shape[-3:] == (64, 64, 3)


def test_sixteen_bits_and_nothing_but_our_lines(folder, tmp_path, capfd):
    lines: list[str] = []
    made = generate(recipe(folder, FULL, dtype="bfloat16"), folder, wanted(tmp_path, folder), say=lines.append)
    # MiniMax-H3's pipeline keeps what it makes in fp32
    assert latents_of(made).dtype == (torch.float32 if family_of(folder).distilled else torch.bfloat16)
    assert shown(made.out).std() > 2
    assert capfd.readouterr() == ("", "")
    assert len(lines) == 6


def test_a_size_the_vae_cannot_make(folder, tmp_path):
    with pytest.raises(UsageError, match="nearest legal"):
        generate(recipe(folder, FULL), folder, wanted(tmp_path, folder, width=61, height=64), say=quiet)
    assert not list(tmp_path.iterdir())


def test_every_pipeline_family_has_a_tiny_pipeline():
    assert set(MAKERS) == set(BY_PIPELINE)
