"""`ultrazoo env`: versions, devices, kernels with reasons, plugins: what a bug report needs."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

from . import common, out

NAME = "env"
PACKAGES = (
    "torch",
    "numpy",
    "einops",
    "omegaconf",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "diffusers",
    "transformers",
    "timm",
    "peft",
    "av",
    "torchmetrics",
    "onnx",
    "onnxruntime",
    "triton",
    "xformers",
    "flash-attn",
)


def command(json: bool = common.JSON) -> None:
    """Print versions, devices, kernels and plugins.

    A kernel that cannot run here says why.
    """
    facts = gather()
    if json:
        out.emit(facts)
        return
    out.echo(out.table([[name, value] for name, value in facts["system"].items()]))
    out.echo()
    out.echo(out.table([[name, version or "not installed"] for name, version in facts["packages"].items()]))
    out.echo()
    out.echo(out.table([_device(row) for row in facts["devices"]], ["device", "name", "memory", "facts"]))
    out.echo()
    from ..kernels import table
    from .listing import kernel_table

    out.echo(kernel_table(table()))
    out.echo()
    if facts["plugins"]:
        rows = [[row["name"], row["kind"], row["from"], row["status"]] for row in facts["plugins"]]
        out.echo(out.table(rows, ["plugin", "kind", "from", "status"]))
    else:
        out.echo("no plugins")


def gather() -> dict[str, Any]:
    """Everything `env` reports, as plain data."""
    import torch

    from .. import CONTRACT, __version__
    from ..kernels import table
    from ..registry import entries

    system = {
        "ultrazoo": __version__,
        "contract": CONTRACT,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpus": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable, {os.cpu_count()} present",
        "threads": f"{torch.get_num_threads()} (torch)",
        "cuda": torch.version.cuda or "torch was built without it",
    }
    plugins = [
        {
            "name": row.name,
            "kind": row.kind,
            "from": f"{row.distribution} {row.version}".rstrip(),
            "status": row.problem or row.status,
        }
        for row in entries()
        if not row.builtin
    ]
    return {
        "system": system,
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(torch),
        "kernels": [asdict(row) for row in table()],
        "plugins": plugins,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "bytes": _memory(), "facts": ""}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            about = f"compute capability {facts.major}.{facts.minor}, {facts.multi_processor_count} SMs"
            rows.append({"device": f"cuda:{index}", "name": facts.name, "bytes": facts.total_memory, "facts": about})
    if torch.backends.mps.is_available():
        rows.append({"device": "mps", "name": "Apple GPU", "bytes": None, "facts": ""})
    return rows


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        # not every system says
        return None


def _device(row: dict[str, Any]) -> list[str]:
    return [row["device"], row["name"], out.size(row["bytes"]) if row["bytes"] else "-", row["facts"]]
