"""Exported files beside the model they came from: forwards in turn, in one process, and how long an export takes.

A Wan of 512 channels, 8 heads and 2 layers (an even and an odd one) at grid (5, 30, 52), 512 text tokens, fp32, two threads: eager,
onnxruntime on its CPU provider and the package of AOTInductor, both files as `ultrazoo.export` writes them, all sizes open. Ratios
are medians over rounds of the times within a round. The gate is the proof of the export itself, at sizes it was not traced at, and
the same comparison at the measured size.

On a GPU: a compiled package of the whole 1.3B recipe at 1080p beside eager and `torch.compile`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ultrazoo
from benchmarks.conftest import THREADS
from benchmarks.measure import Timing, interleaved, watch
from benchmarks.rows import ROOT, Row
from tests.backbones.models import randomise
from ultrazoo.export import Engine, export
from ultrazoo.export.proof import ratio as error_ratio

RESULTS_NAME = "export"
GRID, LAYERS, TEXT, ROUNDS = (5, 30, 52), 2, 512, 9
DESIGNS: dict[str, dict[str, Any]] = {"ultragen": {"name": "ultragen", "variant": "paper"}, "full": {"name": "full"}}
ONNX, AOTI = "onnxruntime no slower than eager", "AOTInductor at least 1.1 x faster than eager"
TARGETS = ("torchscript", "pt2", "onnx", "aoti")
LIMIT_S = 240


def recipe(name: str) -> dict[str, Any]:
    return {
        "name": f"{name}_512",
        "video": {"grid": list(GRID)},
        "backbone": {
            "name": "wan",
            "dim": 512,
            "layers": LAYERS,
            "heads": 8,
            "ffn_dim": 2048,
            "text_dim": 512,
            "text_tokens": TEXT,
        },
        "attention": {"*": DESIGNS[name]},
        "dtype": "float32",
    }


def _inputs(model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    spec: Any = model.spec
    t, h, w = model.plan.grid  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, spec.channels, t, 2 * h, 2 * w, generator=generator)
    text = torch.randn(1, TEXT, spec.text_dim, generator=generator)
    return latents.to(device, dtype), torch.tensor([500.0], device=device), text.to(device, dtype)


def _paired(times: dict[str, Timing], name: str) -> float:
    """How many times faster than eager, the median over rounds."""
    pairs = zip(times["eager"].samples_s, times[name].samples_s, strict=True)
    return statistics.median(eager / other for eager, other in pairs)


@pytest.mark.parametrize("name", DESIGNS)
def test_runtimes_beside_eager(name: str, tmp_path: Path, record: Callable[[Row], None], command: str) -> None:
    torch.manual_seed(0)
    model = randomise(ultrazoo.build(recipe(name))).eval()
    made = {target: export(model, target, tmp_path / target) for target in ("onnx", "aoti")}
    inputs = _inputs(model)
    errors, times = {}, {}
    with torch.inference_mode():
        due = model(*inputs)
    assert error_ratio(torch.zeros_like(due), due) > 0.5
    for target in made:
        engine = Engine(tmp_path / target)
        calls: dict[str, Callable[[], Tensor]] = {
            "eager": lambda: model(*inputs),
            target: lambda engine=engine: engine(*inputs),
        }
        with torch.inference_mode():
            errors[target] = error_ratio(calls[target](), due)
            # each runtime alone beside eager, not in the wake of another's threads
            times[target] = interleaved(calls, rounds=ROUNDS)
        engine.release()
    assert max(errors.values()) <= 1e-5, errors

    case = f"Wan {name}, C 512, 8 heads, {LAYERS} layers, grid {GRID}, {TEXT} text tokens, {THREADS} threads"
    verdicts = {}
    for target, wanted, least in (("onnx", ONNX, 1.0), ("aoti", AOTI, 1.1)):
        found = made[target]
        faster = _paired(times[target], target)
        numbers: dict[str, float | int | str] = {
            "eager_s": round(times[target]["eager"].median_s, 3),
            f"{target}_s": round(times[target][target].median_s, 3),
            "faster": round(faster, 3),
            "spread_eager": round(times[target]["eager"].spread, 2),
            f"spread_{target}": round(times[target][target].spread, 2),
            "file_mb": round(found.file.stat().st_size / 1e6, 1),
        }
        gate = f"proved at {len(found.ratios)} sizes {max(found.ratios):.1e}; at this size {errors[target]:.1e}"
        kernel = ", ".join(found.content["proof"]["runtime"]["kernels"])
        verdicts[target] = faster >= least
        title = f"{case}: {'onnxruntime' if target == 'onnx' else 'AOTInductor'} beside eager"
        row = Row(title, name, "float32", gate, numbers, command, wanted, verdicts[target], kernel, model.plan.hash)
        record(row)
    assert all(verdicts.values()), verdicts


def test_tiny_to_every_target(
    tmp_path: Path, record: Callable[[Row], None], command: str, environment: dict[str, str]
) -> None:
    """The four commands one after the other, each with its proof, as a user types them."""
    taken, worst, kernels, plan_hash = {}, [], set(), ""
    for target in TARGETS:
        out = tmp_path / target
        words = ["ultrazoo", "export", "ultragen_tiny", "--to", target, "-o", str(out)]
        done = watch(words, cwd=ROOT, env=environment, timeout_s=900)
        assert done.code == 0, done.output
        content = Engine(out).content
        assert content["proof"]["holds"]
        worst += [case["ratio"] for case in content["proof"]["cases"]]
        kernels |= set(content["proof"]["runtime"]["kernels"])
        taken[target], plan_hash = done.wall_s, content["hash"]
    total = sum(taken.values())
    numbers: dict[str, float | int | str] = {"all_s": round(total, 1)}
    numbers |= {f"{target}_s": round(seconds, 1) for target, seconds in taken.items()}
    gate = f"every file proved: error ratio at most {max(worst):.1e} at {len(worst)} sizes in all"
    case = f"ultrazoo export ultragen_tiny to {', '.join(TARGETS)}, proofs included, {THREADS} threads"
    target_text, met = f"under {LIMIT_S // 60} minutes on 2 cores", total < LIMIT_S
    record(
        Row(
            case, "ultragen", "float32", gate, numbers, command, target_text, met, ", ".join(sorted(kernels)), plan_hash
        )
    )
    assert met, numbers


@pytest.mark.gpu
def test_package_at_1080p_on_a_gpu(tmp_path: Path, record: Callable[[Row], None], command: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    torch.manual_seed(0)
    model = randomise(ultrazoo.build("ultragen_1080p", "dtype=bfloat16")).eval().to("cuda")
    start = time.perf_counter()
    made = export(model, "aoti", tmp_path / "aoti")
    export_s = time.perf_counter() - start
    inputs = _inputs(model, "cuda", torch.bfloat16)
    engine = Engine(tmp_path / "aoti")
    compiled = torch.compile(model, dynamic=False)
    forms: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: model(*inputs),
        "compile": lambda: compiled(*inputs),
        "aoti": lambda: engine(*inputs),
    }

    def synchronous(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    peaks = {}
    with torch.inference_mode():
        due = forms["eager"]().float()
        errors = {name: error_ratio(forms[name]().float(), due) for name in ("compile", "aoti")}
        # what is rounded where differs: two bf16 forms of thirty layers are this far apart
        assert max(errors.values()) <= 2e-2, errors
        assert error_ratio(torch.zeros_like(due), due) > 0.5
        for name, call in forms.items():
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            # what a forward takes beside weights, which each form holds once
            peaks[name] = torch.cuda.max_memory_allocated() - before
        times = interleaved({name: synchronous(call) for name, call in forms.items()}, rounds=5, warmup=2)
    numbers: dict[str, float | int | str] = {f"{name}_ms": round(1e3 * times[name].median_s, 1) for name in forms}
    numbers |= {f"{name}_forward_mib": peaks[name] >> 20 for name in forms}
    numbers |= {
        "aoti_faster": round(_paired(times, "aoti"), 3),
        "compile_faster": round(_paired(times, "compile"), 3),
        "spread": round(max(one.spread for one in times.values()), 2),
        "export_s": round(export_s),
        "package_gb": round(made.file.stat().st_size / 1e9, 2),
    }
    gate = f"proved at {len(made.ratios)} sizes {max(made.ratios):.1e}; at this size {errors['aoti']:.1e}, compiled {errors['compile']:.1e}"
    kernel = ", ".join(made.content["proof"]["runtime"]["kernels"])
    case = f"{model.plan.name} at grid {model.plan.grid}: AOTInductor's package beside eager and torch.compile"
    record(
        Row(
            case,
            "ultragen",
            "bfloat16",
            gate,
            numbers,
            command,
            kernel=kernel,
            recipe_hash=model.plan.hash,
            device=torch.cuda.get_device_name(),
        )
    )
    assert peaks["aoti"] > 0
