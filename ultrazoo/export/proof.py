"""The proof of an exported file: what it gives in a fresh process, beside what the model gave, at sizes that it was not
traced at.

Inputs and the model's answers lie in ``proof.safetensors`` beside the file, so that the proof can be repeated on the
machine that the file is for, without the model.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import UltrazooError, UsageError
from ..ops.seeds import generator_for
from ..ports import Port
from ..weights.disk import write_bytes
from .sizes import Sizes, inputs_at

FILE = "proof.safetensors"
OUTPUT = "output"
ALLOWED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2, "float64": 1e-10}
"""Error ratios (RMS of the difference over RMS of the model's answer) that a file may have, by dtype; see `allowed`."""
ROUNDINGS = 1.5
"""How many times as far as the model's own rounding carries its answer a file of 16 bits may be from it."""


def ratio(got: Tensor, due: Tensor) -> float:
    """RMS of the difference over RMS of what is due; infinite for another shape or values that are not finite."""
    if got.shape != due.shape:
        return float("inf")
    got, due = got.double(), due.double()
    found = float((got - due).square().mean().sqrt() / due.square().mean().sqrt())
    return found if found == found else float("inf")


def allowed(dtype: str, rounding: float | None) -> float:
    """The error ratio that a file may have: that of the table, or in 16 bits 1.5 times `rounding`, whichever is more.

    A file does the same arithmetic in another order, so that some values round the other way, and every layer carries that
    on: in bfloat16 thirty layers make 1e-2 of a single rounding. `rounding` is what that does to the model itself.
    """
    return max(ALLOWED[dtype], ROUNDINGS * (rounding or 0.0))


def stand_ins(zeros: Mapping[str, Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Values for weights that are all zero, by name: from the name alone.

    A fresh diffusion transformer answers zero whatever comes in, so that nothing could be told from its answer. Matrices
    keep the size of what goes through them, so that every layer has a share in the answer.
    """
    found = {}
    for name, shape in zeros.items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        found[name] = (torch.randn(tuple(shape), generator=generator_for(0, f"proof.{name}")) * scale).to(dtype)
    return found


def zeros_of(model: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of the parameters whose every value is zero."""
    return {
        name: list(one.shape) for name, one in model.named_parameters() if one.numel() and not bool(one.detach().any())
    }


@contextlib.contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in the place of some parameters, for the length of the block."""
    own = dict(model.named_parameters())
    kept = {name: own[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)


class Prepared(NamedTuple):
    """Shapes of the weights that had stand-ins, by name, and in 16 bits what one rounding does to the model (`rounding_of`)."""

    zeros: dict[str, list[int]]
    rounding: float | None


def prepare(
    model: nn.Module, ports: Sequence[Port], cases: Sequence[Sizes], dtype: torch.dtype, folder: Path
) -> Prepared:
    """Run the model at every size and keep inputs and answers in `folder`."""
    zeros = zeros_of(model)
    kept: dict[str, Tensor] = {}
    smallest = min(range(len(cases)), key=lambda index: math.prod(cases[index].values()))
    rounding = None
    with replaced(model, stand_ins(zeros, dtype)):
        for index, sizes in enumerate(cases):
            inputs = inputs_at(ports, sizes, dtype, seed=index)
            found = _answer(model, inputs)
            if not bool(found.any()) or not bool(found.isfinite().all()):
                what = "zero" if bool(found.isfinite().all()) else "not finite"
                raise UltrazooError(f"the model's answer at {shown(sizes)} is {what}: nothing can be proved with it")
            kept.update({f"{index}.{name}": value for name, value in inputs.items()})
            kept[f"{index}.{OUTPUT}"] = found
            if index == smallest and dtype.itemsize == 2:
                rounding = rounding_of(model, inputs, found)
    write_bytes(folder / FILE, save(kept))
    return Prepared(zeros, rounding)


def _answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(*(value.to(device) for value in inputs.values())).cpu().contiguous()  # type: ignore[no-any-return]


def rounding_of(model: nn.Module, inputs: Mapping[str, Tensor], due: Tensor) -> float:
    """How far the model's answer moves (`ratio`) when the corner of its first input moves by one rounding, in its dtype."""
    name, first = next(iter(inputs.items()))
    moved = first.clone()
    moved[..., 0, 0] *= 1 + torch.finfo(first.dtype).eps
    return ratio(_answer(model, {**inputs, name: moved}), due)


COMMAND = (sys.executable, "-m", "ultrazoo.export.fresh")


def run_fresh(file: Path, folder: Path) -> dict[str, Any]:
    """Prove `file` against ``proof.safetensors`` of `folder` in a process of its own: the error ratio of every case and
    the facts of the runtime. Raises UltrazooError when the runtime cannot load or run the file."""
    shared = _SHARED.get()
    if shared is not None:
        return _read(file, *shared.ask(file, folder))
    done = subprocess.run([*COMMAND, str(file), str(folder)], capture_output=True, text=True, check=False)
    return _read(file, done.stdout, done.stderr, done.returncode)


def _read(file: Path, out: str, said: str, code: int) -> dict[str, Any]:
    try:
        found = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        lines = [line for line in said.splitlines() if line.strip()]
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UltrazooError(
            f"{file.name} did not run in a fresh process ({end}): {lines[-1] if lines else 'it said nothing'}"
        ) from None
    if "error" in found:
        raise UltrazooError(f"{file.name} does not run: {found['error']}")
    return found  # type: ignore[no-any-return]


class _Shared:
    """A process that proves one file after the other; where one brings it down, the next gets a new one."""

    def __init__(self, said: IO[str]):
        self.said = said
        self.process: subprocess.Popen[str] | None = None

    def ask(self, file: Path, folder: Path) -> tuple[str, str, int]:
        """What the process prints of `file`, what it has said so far, and its exit code, 0 while it lives."""
        if self.process is None or self.process.poll() is not None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=self.said, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(file.resolve()), str(folder.resolve())]) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return line, "", 0
        code = self.process.wait()
        self.process = None
        self.said.seek(0)
        return "", self.said.read(), code

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


_SHARED: contextvars.ContextVar[_Shared | None] = contextvars.ContextVar("ultrazoo_shared_proofs", default=None)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Inside the ``with`` block, every proof happens in the same fresh process: whoever proves many files saves its start."""
    with tempfile.TemporaryFile("w+") as said:
        shared = _Shared(said)
        token = _SHARED.set(shared)
        try:
            yield
        finally:
            _SHARED.reset(token)
            shared.close()


def cases_in(folder: Path) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and the model's answer of every case in a folder. Raises UsageError where there are none."""
    path = folder / FILE
    try:
        content = load_file(path)
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no {FILE}: this model was exported without a proof; export it again"
        ) from None
    except Exception as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    count = 1 + max(int(name.partition(".")[0]) for name in content)
    found = []
    for index in range(count):
        one = {name.partition(".")[2]: v for name, v in content.items() if name.startswith(f"{index}.")}
        found.append((one, one.pop(OUTPUT)))
    return found


def shown(sizes: Sizes) -> str:
    """Sizes for people: ``b 2, grid 3x9x10, text 7``."""
    grid = "x".join(str(sizes[axis]) for axis in ("t", "h", "w") if axis in sizes)
    parts = [f"batch {sizes['b']}", f"grid {grid}"] + ([f"text {sizes['text']}"] if "text" in sizes else [])
    return ", ".join(parts)
