"""Which transformers run, how often, at which step: two experts, guidance, offloading, memory."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import diffusers
import pytest
import torch

from tests.cli.program import apart, here
from tests.generate.commands import made, refused
from tests.generate.runs import FULL, WINDOWS, latents, recipe
from tests.generate.tiny_pipelines import pipeline_folder
from tests.generate.tiny_pipelines import wan as make_wan
from ultrazoo.generate import memory
from ultrazoo.generate.families import BY_PIPELINE, Request
from ultrazoo.generate.latents import Latents
from ultrazoo.generate.pipelines import weight_elements
from ultrazoo.generate.run import generate
from ultrazoo.generate.wanted import Wanted
from ultrazoo.testing import error_ratio

# sizes


def test_a_grid_is_the_size_behind_it(place, wan):
    due = latents(recipe(WINDOWS), wan, place / "pixels")
    grid = recipe(WINDOWS, video={"grid": [3, 4, 4]})
    assert torch.equal(latents(grid, wan, place / "grid"), due)
    wider = latents(grid, wan, place / "wider", width=96, height=64, frames=5)
    assert torch.equal(wider, latents(recipe(WINDOWS), wan, place / "same", width=96, frames=5))


def test_variants_beside_the_weights_are_not_counted(place, wan):
    shutil.copytree(wan, place / "pipe")
    index = json.loads((wan / "model_index.json").read_text())
    counted = weight_elements(wan, index)
    weights = place / "pipe" / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert weight_elements(place / "pipe", index) == counted
    model = diffusers.AutoencoderKLWan.from_pretrained(wan / "vae")
    assert counted["vae"] == sum(one.numel() for one in model.parameters())


# two experts


def test_two_experts_both_run_the_recipe(capsys, place, build):
    torch.manual_seed(0)
    folder = place / "two"
    make_wan(folder, experts=2)
    pipeline = diffusers.WanPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    family = BY_PIPELINE["WanPipeline"]
    arguments = family.arguments(Request("a red ball", 64, 64, 9, 3, 4.0))
    with torch.no_grad():
        due = pipeline(**arguments, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    full = latents(recipe(FULL), folder, place / "full")
    # zero mean and unit deviation of this VAE's latents: what is decoded is what was sampled
    assert error_ratio(full, due) < 1e-4
    near = latents(recipe(WINDOWS), folder, place / "near")
    # the last step is the second expert's alone, so its attention and its count of steps are seen there
    last = latents(recipe(WINDOWS, steps={"2": FULL}), folder, place / "last")
    assert error_ratio(near, full) > 1e-2
    assert error_ratio(last, near) > 1e-4
    every = latents(recipe(WINDOWS, steps={"0-2": FULL}), folder, place / "every")
    assert torch.equal(every, full)
    model = build("random")
    asked = ("--pipeline", str(folder), "-o", "o.mp4", "--prompt", "a")
    refused(here(capsys, "generate", str(model), *asked), "has two transformers")


# guidance


FORWARDS = {
    # two forwards a step, told apart by what the pipeline calls them
    "WanPipeline": ("cond", "uncond"),
    "HunyuanVideo15Pipeline": ("pred_cond", "pred_uncond"),
    "QwenImagePipeline": ("cond", "uncond"),
    "Flux2KleinPipeline": ("cond", "uncond"),
    # one forward: of a doubled batch, or with the scale as an input
    "PixArtSigmaPipeline": (None,),
    "Flux2Pipeline": (None,),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_of_a_step(place, monkeypatch, name):
    folder = pipeline_folder(name, place / "pipe")
    family = BY_PIPELINE[name]
    cls = getattr(diffusers, family.model)
    seen: list[tuple[Any, ...]] = []
    forward = cls.forward

    @functools.wraps(forward)
    def noting(self: Any, hidden_states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        # pricing the plan runs a model of its own, without attentions
        if hasattr(self, "session"):
            seen.append((self.session.step, self.session.branch, len(hidden_states)))
        return forward(self, hidden_states, *rest, **more)

    monkeypatch.setattr(cls, "forward", noting)
    asked = recipe(FULL, video={"width": 64, "height": 64, "frames": 9 if family.kind == "video" else 1})
    suffix = ".mp4" if family.kind == "video" else ".png"

    def sampled(label: str, **more: Any) -> torch.Tensor:
        wanted = Wanted("a red ball", place / f"{label}{suffix}", **more)
        return Latents.load(generate(asked, folder, wanted, say=lambda _: None).latents).video[0]

    guided = sampled("guided")
    batch = 2 if family.doubled else 1
    assert seen == [((step, 3), branch, batch) for step in range(3) for branch in FORWARDS[name]]
    seen.clear()
    alone = sampled("alone", guidance=1.0)
    assert seen == [((step, 3), FORWARDS[name][0], 1) for step in range(3)]
    assert not torch.allclose(guided, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Flux2Pipeline", ("--negative-prompt", "fog"), "takes no negative prompt"),
        ("Flux2KleinPipeline", ("--guidance", "4"), "is in its weights"),
        ("QwenImagePipeline", ("--negative-prompt", "fog", "--guidance", "1"), "and guidance is 1"),
        ("PixArtSigmaPipeline", ("--frames", "9"), "makes one image and 9 frames are asked for"),
    ],
)
def test_what_would_be_ignored_is_refused(capsys, place, name, options, said):
    folder = pipeline_folder(name, place / "pipe")
    index = folder / "model_index.json"
    if name == "Flux2KleinPipeline":
        index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    asked = ("video.frames=1", "--pipeline", str(folder), "-o", "o.png", "--prompt", "a red ball")
    refused(here(capsys, "generate", "tiny.yaml", *asked, *options), said)
    assert not list(place.glob("o.*"))


def test_a_negative_prompt_and_a_long_one(capsys, place, wan):
    assert made(capsys, wan).code == 0
    plain = Latents.load(place / "o.latents.safetensors").video[0]
    ran = made(capsys, wan, "--negative-prompt", "blue glass", "--force")
    assert ran.code == 0, ran.err
    assert "tokens" not in ran.err
    assert not torch.allclose(Latents.load(place / "o.latents.safetensors").video[0], plain, atol=1e-3)
    ran = made(capsys, wan, "--force", prompt="red " * 600)
    assert ran.code == 0, ran.err
    assert "warning: the prompt has 600 tokens, of which this pipeline reads 512" in ran.err


# offloading and memory


def estimate(offloaded: bool, free: int | None) -> memory.Estimate:
    weights = {"text_encoder": 500, "transformer": 300, "vae": 40}
    return memory.Estimate(weights, 100, 200, 20, free, offloaded)


def test_one_component_at_a_time_needs_less():
    assert estimate(False, 0).sampling == 940
    assert estimate(True, 0).sampling == 500
    assert memory.Estimate({"transformer": 300, "vae": 40}, 100, 200, 20, 0, True).sampling == 400
    assert memory.tiling(estimate(True, 600), "auto") == (False, "")
    with pytest.raises(Exception, match="940 B to sample and 600 B are free"):
        memory.tiling(estimate(False, 600), "auto")


def test_tiles_when_the_whole_does_not_fit():
    found = memory.Estimate({"transformer": 10, "vae": 40}, 100, 200, 20, 200)
    assert memory.tiling(found, "auto")[0]
    assert "240 B of 200 B" in memory.tiling(found, "auto")[1]
    for wanted, said in (("off", "drop --tile off"), ("auto", "even in tiles")):
        with pytest.raises(Exception, match=said):
            memory.tiling(memory.Estimate({"vae": 40}, 0, 200, 200 if wanted == "auto" else 20, 200), wanted)


def test_models_that_are_fetched_for_their_work(place, wan, monkeypatch):
    """The hooks of offloading, as diffusers places them, on the CPU: what they wrap is what runs, and they are gone after."""
    from accelerate import cpu_offload_with_hook
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    seen: list[Any] = []

    def offload(self: Any, device: Any) -> None:
        seen.append(self)
        hook = None
        for name in self.model_cpu_offload_seq.split("->"):
            if isinstance(self.components.get(name), torch.nn.Module):
                _, hook = cpu_offload_with_hook(self.components[name], device, prev_module_hook=hook)
        self._all_hooks = []

    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", offload)
    monkeypatch.setattr("ultrazoo.generate.before.require_offload", lambda *_: None)
    moved = latents(recipe(WINDOWS), wan, place / "moved", offload=True)
    assert len(seen) == 1
    assert seen[0].transformer is None
    assert not hasattr(seen[0].vae, "_hf_hook")
    assert torch.equal(moved, latents(recipe(WINDOWS), wan, place / "there"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
def test_offloading_makes_the_same(place, wan):
    there = latents(recipe(FULL), wan, place / "there", device="cuda")
    moved = latents(recipe(FULL), wan, place / "moved", device="cuda", offload=True)
    assert error_ratio(moved, there) < 1e-5


# what is said


def test_another_process_makes_the_same_bit_for_bit_and_says_nothing_but_our_lines(capsys, place):
    folder = pipeline_folder("HunyuanVideo15Pipeline", place / "pipe")
    asked = ("--pipeline", str(folder), "-o", "p.mp4", "--prompt", "a red ball", "--seed", "7", "--json")
    ran = apart("generate", "tiny.yaml", *asked, cwd=place)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["output"] == "p.mp4"
    assert found["seed"] == 7
    starts = ("weights ", "sampling ", "decoding ", "free ", "latents saved: ", "written: ")
    assert [line for line in ran.err.splitlines() if not line.startswith(starts)] == []
    assert len(ran.err.splitlines()) == len(starts)
    assert made(capsys, folder, "--seed", "7").code == 0
    one, other = (Latents.load(place / f"{name}.latents.safetensors").video[0] for name in "op")
    assert torch.equal(one, other)
