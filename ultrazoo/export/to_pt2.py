"""``.pt2``: torch's exported program, saved and loaded by torch itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from .kernels_seen import watching
from .targets import STEM, Job

SUFFIX = ".exported.pt2"
SUMMARY = "torch's exported program: opens in Python with torch alone, can be compiled or edited further"


def absent() -> str:
    """Why this target cannot be written here; empty when it can."""
    return ""


def write(job: Job, folder: Path) -> Path:
    path = folder / f"{STEM}{SUFFIX}"
    torch.export.save(job.program, path, extra_files=dict(job.metadata))
    return path


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the ``with`` block, equal strings are one expression of sympy's: torch's loader parses the few sizes of a model
    again for every tensor, which takes most of its time (torch 2.15)."""
    parse = sympy.sympify
    known: dict[str, Any] = {}

    @functools.wraps(parse)
    def once(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, str):
            return parse(value, *args, **kwargs)
        if value not in known:
            known[value] = parse(value, *args, **kwargs)
        return known[value]

    sympy.sympify = once
    try:
        yield
    finally:
        sympy.sympify = parse


class Loaded:
    """An exported program, run by torch's interpreter."""

    def __init__(self, path: Path):
        with _parsed_once():
            self.module = torch.export.load(path).module()
        self.seen: list[str] = []

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), watching(self.seen):
            return self.module(*inputs.values())  # type: ignore[no-any-return]

    def not_zero(self, names: Iterable[str]) -> list[str]:
        own = dict(self.module.named_parameters())
        return [name for name in names if name not in own or bool(own[name].any())]

    def replace(self, values: Mapping[str, Tensor]) -> None:
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)

    def facts(self) -> dict[str, Any]:
        return {"runtime": "torch.export", "torch": torch.__version__, "kernels": sorted(set(self.seen))}
