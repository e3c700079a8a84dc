"""`ultrazoo convert`: a checkpoint in another program's layout, every tensor bit for bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..cost import units
from ..errors import UsageError
from . import common, out
from .building import pages
from .progress import bar

if TYPE_CHECKING:
    from ..checkpoints.convert import Converted

NAME = "convert"


def command(
    arguments: list[str] = typer.Argument(
        help="What to read (file or directory), what to write (directory, or a .safetensors, .ckpt, .pt or .pth file), "
        "then key=value where the shapes of the tensors do not tell (backbone.heads=12).",
        metavar="IN OUT [KEY=VALUE]...",
    ),
    to: str | None = typer.Option(
        None, "--to", help="Layout to write: diffusers, wan, ultragen or ultrazoo; lora takes out a design's own LoRAs."
    ),
    lora: str | None = typer.Option(
        None,
        "--lora",
        help="A LoRA in peft's layout (directory or file) to add to the weights on the way.",
        metavar="PATH",
    ),
    merge: bool = typer.Option(
        False, "--merge-lora", help="Turn adapt: lora into adapt: own, in weights and recipe (writes ultrazoo)."
    ),
    force: bool = typer.Option(False, "--force", help="Replace what is there."),
    json: bool = common.JSON,
) -> None:
    """Convert a checkpoint between the layouts of diffusers, Wan, UltraGen and ultrazoo.

    The layout that is read is told by its keys. Tensors keep their bits. What does not fit is shown, and nothing written.
    """
    source, target, overrides = places(arguments)
    to = to or ("ultrazoo" if merge else None)
    if to is None:
        raise UsageError("say the layout to write: --to diffusers, wan, ultragen, ultrazoo or lora")
    if to == "lora":
        if merge or lora is not None:
            raise UsageError("--to lora takes LoRAs out as they are; it goes with neither --lora nor --merge-lora")
        _take_out(source, target, overrides, force, json)
        return
    from ..checkpoints.convert import convert

    start = time.perf_counter()
    if not json:
        out.note(f"converting {source} to {to} in {target}")
    with bar("writing") as advance:
        done = convert(
            source,
            target,
            to,
            overrides=overrides,
            lora=lora,
            merge=merge,
            force=force,
            progress=advance,
            extra_files=pages,
        )
    seconds = time.perf_counter() - start
    if json:
        out.emit({**done.data(), "seconds": round(seconds, 3)})
    else:
        show(done, seconds)


def _take_out(source: str, target: str, overrides: list[str], force: bool, json: bool) -> None:
    from ..checkpoints.lora import extract_lora

    written = extract_lora(source, target, overrides=overrides, force=force)
    if json:
        out.emit({"source": source, "to": "lora", "out": target, "files": [one.data() for one in written]})
        return
    (file,) = written
    out.echo(f"{Path(target) / file.file}   {file.tensors} tensors, {units.count(file.parameters)} parameters")


def places(arguments: list[str]) -> tuple[str, str, list[str]]:
    """IN, OUT and the overrides of a command line; raises UsageError."""
    paths = [argument for argument in arguments if not common.is_override(argument)]
    overrides = [argument for argument in arguments if common.is_override(argument)]
    if len(paths) != 2:
        raise UsageError(f"convert takes what to read and what to write, got {len(paths)} paths: {', '.join(paths)}")
    return paths[0], paths[1], overrides


def show(done: Converted, seconds: float) -> None:
    """The result for a reader."""
    behind = f", keys behind the prefix {done.prefix!r}" if done.prefix else ""
    out.echo(f"{done.source}: {done.origin}{behind}")
    for note in done.notes:
        out.echo(f"  note: {note}")
    base = Path(done.out)
    rows = [
        [str(base / one.file if base.is_dir() else base), out.size(one.nbytes), f"sha256 {one.sha256}"]
        for one in done.files
    ]
    out.echo(out.table(rows, right="lrl"))
    out.echo(
        f"{done.tensors} tensors, {units.count(done.parameters)} parameters ({', '.join(done.dtypes)}) as {done.format} "
        f"in {units.duration(seconds)}"
    )
    if done.merged_from is not None:
        before, after = done.data()["before"], done.data()["after"]
        flops = f"{units.flops(before['flops'])} → {units.flops(after['flops'])}"
        parameters = f"{units.count(before['parameters'])} → {units.count(after['parameters'])}"
        # often less than the digits shown: the projections are a small part of a forward
        change = f"{100 * (after['flops'] / before['flops'] - 1):+.2g} %"
        out.echo(f"adapt: lora merged into adapt: own: forward {flops} ({change}), parameters {parameters}")
