"""AOTInductor: a package compiled for this machine's device, loaded from C++ or Python."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .aoti_forms import onednn_depthwise, onednn_linears
from .targets import STEM, Job

SUFFIX = ".aoti.pt2"
SUMMARY = "compiled for this machine's device by AOTInductor: the fastest, and valid on this kind of device alone"

SETTINGS = {
    # index arithmetic that is folded into the places that read by it ends in an assertion of sympy's (torch 2.15), and
    # would be done again for every element
    "constant_and_index_propagation": False,
    # what several read is computed once from fewer operations on than torch thinks (30): rotary tables again for every head,
    # and index arrays for every row, cost more than reading them
    "realize_opcount_threshold": 6,
    # as many threads as the process has that loads it, not as this one has
    "cpp.dynamic_threads": True,
}


def absent() -> str:
    """Why this target cannot be written here; empty when it can."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"AOTInductor needs a C++ compiler and {compiler!r} is not on PATH; install g++ or set CXX"
    return ""


def write(job: Job, folder: Path) -> Path:
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    path = folder / f"{STEM}{SUFFIX}"
    onednn_linears(job.program)
    # an exporter takes every open size for two at least
    if all(axis in job.bounds and job.bounds[axis].low >= 2 for axis in "thw"):
        onednn_depthwise(job.program)
    # what this machine's vector units can do is tried with a compiler, once for all exports
    valid_vec_isa_list()
    # the compiler's cache holds a copy of the weights; it goes with the run
    with tempfile.TemporaryDirectory(prefix=".aoti-", dir=folder) as cache:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            torch._inductor.aoti_compile_and_package(
                job.program,
                package_path=str(path),
                inductor_configs={**SETTINGS, "aot_inductor.metadata": dict(job.metadata)},
            )
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    return path


class Loaded:
    """A compiled package."""

    def __init__(self, path: Path):
        self.path = path
        self.module = torch._inductor.aoti_load_package(str(path))

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.module(*inputs.values())  # type: ignore[no-any-return]

    def not_zero(self, names: Iterable[str]) -> list[str]:
        """Compiled code gives its weights to nobody; of those that are all zero it must at least have the names."""
        own = set(self.module.get_constant_fqns())
        return [name for name in names if name not in own]

    def replace(self, values: Mapping[str, Tensor]) -> None:
        self.module.load_constants(dict(values), check_full_update=False)

    def facts(self) -> dict[str, Any]:
        calls = _attention_calls(self.path)
        return {
            "runtime": "AOTInductor",
            "torch": torch.__version__,
            "device": self.module.get_metadata().get("AOTI_DEVICE_KEY", ""),
            "kernels": sorted(set(calls)),
            "attention_calls": len(calls),
        }


def _attention_calls(path: Path) -> list[str]:
    """The attention operators that the compiled code calls, by the names of torch's C interface; what the compiler has
    written out as products and a softmax is not among them."""
    found: list[str] = []
    with zipfile.ZipFile(path) as package:
        for name in package.namelist():
            if name.endswith(".wrapper.cpp"):
                calls = re.findall(rb"aoti_torch_(?:cpu|cuda)__(\w*attention\w*)\(", package.read(name))
                found += [one.decode() for one in calls]
    return found
