"""`ultrazoo generate`: an image or a video from a local pipeline whose transformer runs a recipe's attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from ..cost import units
from ..errors import UsageError
from . import common, out

NAME = "generate"
DTYPES = ("bfloat16", "float16", "float32")
TILES = ("auto", "on", "off")


def command(
    arguments: list[str] = typer.Argument(
        None,
        help="A recipe by path or name, or the folder of a built model, then key=value overrides.",
        metavar="RECIPE [KEY=VALUE]...",
        autocompletion=common.complete_recipe,
    ),
    engine: list[Path] = typer.Option(
        None,
        "--engine",
        help="An exported file, or its directory, in the transformer's place; needs no recipe. Once for each phase of steps.",
    ),
    pipeline: Path = typer.Option(..., "--pipeline", help="Folder of a diffusers pipeline. Nothing is downloaded."),
    output: Path = typer.Option(..., "-o", "--output", help="File to write: .mp4 or .png, as the pipeline makes."),
    prompt: str = typer.Option("", "--prompt", help="What to make."),
    prompt_file: Path | None = typer.Option(None, "--prompt-file", help="The prompt as a text file, UTF-8."),
    negative: str | None = typer.Option(None, "--negative-prompt", help="What to keep away from."),
    size: str | None = typer.Option(None, "--size", help="Pixels, as 832x480; the recipe's unless given."),
    frames: int | None = typer.Option(None, "--frames", help="Frames; the recipe's unless given.", min=1),
    steps: int | None = typer.Option(None, "--steps", help="Denoising steps; the recipe's unless given.", min=1),
    guidance: float | None = typer.Option(None, "--guidance", help="Guidance scale; the recipe's unless given.", min=0),
    seed: int | None = typer.Option(
        None, "--seed", help="Of the noise, drawn on the CPU: the same on every device. 0 unless given.", min=0
    ),
    fps: float | None = typer.Option(None, "--fps", help="Frames per second of the file; the model's unless given."),
    device: str = typer.Option("cpu", "--device", help="cpu, cuda, cuda:1 …"),
    dtype: str | None = typer.Option(None, "--dtype", help=f"{', '.join(DTYPES)}; the recipe's unless given."),
    tile: str = typer.Option("auto", "--tile", help="Decode in tiles: auto (when memory asks for it), on, off."),
    offload: bool = typer.Option(False, "--offload", help="Keep on the GPU only the model that is at work."),
    latents: Path | None = typer.Option(
        None, "--latents", help="Where latents are saved; beside the output unless given."
    ),
    from_latents: Path | None = typer.Option(None, "--from-latents", help="Decode these saved latents; no sampling."),
    force: bool = typer.Option(False, "--force", help="Replace files that exist."),
    json: bool = common.JSON,
) -> None:
    """Make an image or a video.

    Latents are saved before they are decoded, so that a failed decoding loses nothing: --from-latents goes on from there.
    A recipe, size, prompt or seed given beside --from-latents must be the one that they were sampled with, a recipe beside
    --engine the one that was exported.
    """
    common.one_of(dtype, DTYPES, "--dtype")
    common.one_of(tile, TILES, "--tile")
    width, height = (None, None) if size is None else common.size_of(size)
    from ..generate import before, run
    from ..generate.wanted import Wanted

    if prompt_file is not None:
        if prompt:
            raise UsageError("give either --prompt or --prompt-file, not both")
        prompt = before.prompt_in(prompt_file)
    wanted = Wanted(
        prompt=prompt,
        out=output,
        negative=negative,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        guidance=guidance,
        seed=seed,
        fps=fps,
        device=common.checked_device(device),
        dtype=dtype,
        tile=tile,
        latents=latents,
        force=force,
        offload=offload,
        engines=tuple(engine or ()),
    )
    recipe: str | None = None
    overrides: list[str] = []
    if arguments or (from_latents is None and not engine):
        (recipe,), overrides = common.split(arguments or [], verb="generate")
    if from_latents is None:
        made = run.generate(recipe, pipeline, wanted, *overrides, say=out.note, bars=sys.stderr.isatty())
    else:
        made = run.resume(pipeline, from_latents, wanted, *overrides, source=recipe, say=out.note)
    _show(made, json)


def _show(made: Any, json: bool) -> None:
    facts = {
        "output": str(made.out),
        "latents": str(made.latents),
        "sampling_s": round(made.sampling_s, 2),
        "decoding_s": round(made.decoding_s, 2),
        "tiled": made.tiled,
        **made.note,
    }
    if json:
        out.emit(facts)
        return
    spent = f"sampled in {units.duration(made.sampling_s)}, decoded in {units.duration(made.decoding_s)}"
    out.echo(f"{made.out}: {made.note['width']}x{made.note['height']}, {made.note['frames']} frames, {spent}")
