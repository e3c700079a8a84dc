"""`ultrazoo capture`: a pipeline's queries, keys and values, for `ultrazoo probe`."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from ..errors import UsageError
from . import common, out
from .generating import DTYPES

NAME = "capture"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def command(
    pipeline: Path = typer.Argument(
        help="Folder of a diffusers pipeline. Nothing is downloaded.", metavar="PIPELINE_DIR"
    ),
    prompts: Path = typer.Option(..., "--prompts", help="Text file with one prompt a line, UTF-8."),
    output: Path = typer.Option(..., "-o", "--output", help="Directory to write, or to go on with."),
    size: str = typer.Option(..., "--size", help="Pixels, as 832x480."),
    frames: int = typer.Option(1, "--frames", help="Frames of a video.", min=1),
    sampling_steps: int = typer.Option(30, "--sampling-steps", help="Denoising steps that the pipeline makes.", min=1),
    steps: str = typer.Option("*", "--steps", help="Which of them to record, as keys of recipes: 0,10,20 or 0-29/10."),
    layers: str = typer.Option(
        "*", "--layers", help="Which layers to record, as keys of recipes: 0-2, first3, 0-29/5."
    ),
    heads: str = typer.Option("*", "--heads", help="Which heads to record, in the same form."),
    inputs: bool = typer.Option(
        False, "--inputs", help="Also the input of each block and its projections, for designs that compress or adapt."
    ),
    guidance: float | None = typer.Option(
        None, "--guidance", help="Guidance scale; the pipeline's unless given.", min=0
    ),
    seed: int = typer.Option(0, "--seed", help="Of the first prompt's noise; each further one takes the next.", min=0),
    device: str = typer.Option("cpu", "--device", help="cpu, cuda, cuda:1 …"),
    dtype: str = typer.Option(
        "bfloat16", "--dtype", help=f"Of the pipeline and of what is written: {', '.join(DTYPES)}."
    ),
    offload: bool = typer.Option(False, "--offload", help="Keep on the GPU only the model that is at work."),
    limit: str = typer.Option("4GB", "--limit", help="Most bytes to write, as 500MB or 20GB."),
    json: bool = common.JSON,
) -> None:
    """Record a pipeline's queries, keys and values.

    Samples every prompt and writes, for the steps, layers and heads asked for, q, k and v as they go into the softmax. The
    size is estimated first and bounded by --limit. The same command goes on where it was cut off.
    """
    common.one_of(dtype, DTYPES, "--dtype")
    bound = bytes_of(limit)
    width, height = common.size_of(size)
    from ..generate.capturing import CaptureWanted, capture_pipeline, prompts_in

    wanted = CaptureWanted(
        prompts=prompts_in(prompts),
        out=output,
        width=width,
        height=height,
        frames=frames,
        sampling_steps=sampling_steps,
        steps=steps,
        layers=layers,
        heads=heads,
        inputs=inputs,
        guidance=guidance,
        seed=seed,
        device=common.checked_device(device),
        dtype=dtype,
        offload=offload,
        limit=bound,
    )
    held = capture_pipeline(pipeline, wanted, say=out.note)
    if json:
        models = {name: one.model for name, one in held.models.items()}
        facts = {"files": len(held.items), "bytes": held.nbytes, "complete": held.complete, "models": models}
        out.emit({"output": str(output), **facts, "request": dict(held.request)})
        return
    out.echo(f"{output}: {len(held.items)} files, {out.size(held.nbytes)}")


def bytes_of(text: str) -> int:
    """``500MB`` as a number of bytes, in powers of ten. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().casefold())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--limit is a number of bytes, as 500MB or 20GB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])
