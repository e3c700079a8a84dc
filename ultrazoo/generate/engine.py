"""An exported file in the transformer's place: a pipeline calls it as it calls the model that the file was made of.

The file says itself which recipe it is, so no recipe is needed. A step schedule is one file per phase; they are checked
together, before anything is sampled, and at most one of them is in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import assemble
from ..backbones.facade import Config, Sample, refuse_attention_kwargs
from ..backbones.recognised import NATIVE
from ..backbones.session import Session
from ..errors import UsageError, listed
from ..export import Engine, record
from ..export.before import opened
from ..export.phases import phases_of
from ..export.proof import FILE as PROOF
from ..grid import Grid
from ..recipe import Plan
from .before import warnings_of

ENTRIES = ("latents", "timestep", "text")
"""The inputs of a file that stands in a pipeline: what the pipeline calls hidden_states, timestep, encoder_hidden_states."""

SCORE_BYTES = 4


class EngineModel(nn.Module):
    """Exported files of one model, one, or one for each phase of a step schedule, with what pipelines read of a transformer.

    ``pipeline.transformer = EngineModel(["exports/wan-onnx"])``. `dtype` is the files', `device` where the pipeline put it:
    inputs go from there to the file's own device and the answer comes back. Raises UsageError for what `Engine` refuses, a
    backbone that no pipeline calls, files of different models, and phases that overlap.
    """

    place: Tensor

    def __init__(self, files: Sequence[str | os.PathLike[str]]):
        super().__init__()
        self.engines = _in_order([Engine(one) for one in files])
        self.plan = _plan_of(self.engines[0])
        skeleton: Any = assemble.skeleton(self.plan)
        self.config: Config = skeleton.config
        self.session: Session = skeleton.session
        # goes where the pipeline moves its models
        self.register_buffer("place", torch.empty(0, dtype=torch.uint8), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.engines[0].dtype

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def label(self) -> str:
        """The files, for people."""
        return listed(str(one.file) for one in self.engines)

    @contextlib.contextmanager
    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, **_: Any
    ) -> Iterator[None]:
        """One forward of a pipeline: guidance branch `name` at a sampling step, as `PipelineBackbone` has it."""
        with self.session.announced(name, step_index, num_inference_steps):
            yield

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool | None = None,
    ) -> Sample:
        """hidden_states (B, C, F, h, w), timestep (B,) or one for every token (B, N), text (B, L, channels) → the first's
        shape. `return_dict` makes no difference, as in the native model."""
        refuse_attention_kwargs(attention_kwargs)
        engine = self.due()
        return Sample(engine(hidden_states, per_sample(timestep), encoder_hidden_states))

    def due(self) -> Engine:
        """The file of the sampling step; the others give their memory back. Raises UsageError where the step is not known
        or no file is for it."""
        if phase_of(self.engines[0]) is None:
            return self.engines[0]
        step = self.session.step
        if step is None:
            raise UsageError(
                f"{self.label} runs at some steps alone: call model.session.select(step, num_steps) before every step"
            )
        found = [one for one in self.engines if step[0] in _steps(one)]
        if not found:
            raise UsageError(f"step {step[0]} of {step[1]} is in no phase of {self.label}")
        for one in self.engines:
            if one is not found[0]:
                one.release()
        return found[0]

    def require_steps(self, steps: int) -> None:
        """Raise UsageError unless every one of `steps` sampling steps has a file."""
        if phase_of(self.engines[0]) is None:
            return
        lacking = [step for step in range(steps) if not any(step in _steps(one) for one in self.engines)]
        if not lacking:
            return
        have = listed(f"{one.file} is for {_shown(_steps(one))}" for one in self.engines)
        phases = [range(first, last + 1) for first, last in phases_of(self.plan)]
        more = [one for one in phases if any(step in one for step in lacking)]
        beyond = [step for step in lacking if not any(step in one for one in phases)]
        cure = []
        if more:
            wanted = listed(f"--phase {one[0]}-{one[-1]}" for one in more)
            cure.append(f"export {wanted} as well and give every file with an --engine of its own")
        if beyond:
            cure.append(f"the recipe's schedule ends before step {beyond[0]}: export again with sampling.steps={steps}")
        raise UsageError(f"{have}, and this run makes {steps} steps: {'; '.join(cure)}")

    def activation_bytes(self, grid: Grid) -> int:
        """Bytes of activations that a forward of one sample needs beside the weights, an estimate.

        onnxruntime's operator holds the scores of an attention in fp32: all query-key pairs of the largest layer.
        """
        data = self.plan.resolved.data()
        sized = assemble.plan_of({**data, "video": {"grid": list(grid)}})
        found = sized.totals.activation_bytes.infer
        if self.engines[0].content["target"] != "onnx":
            return found
        resolved = sized.resolved
        maps = [dict(enumerate(resolved.attention)), *(dict(one.layers) for one in resolved.steps)]
        sites = resolved.sites
        pairs = [spec.cost(sites[at]).pairs * sites[at].heads for layers in maps for at, spec in layers.items()]
        return found + max(pairs) * SCORE_BYTES

    def warnings(self) -> list[str]:
        """What is to be said of the numbers in the files before they run."""
        weights = self.engines[0].content["weights"]
        return warnings_of(self.plan, weights["origin"], weights["fresh"])

    def facts(self) -> list[dict[str, Any]]:
        """What latents say of the files that they were sampled with."""
        return [_facts(one.content) for one in self.engines]


def phase_of(engine: Engine) -> tuple[int, int] | None:
    """The sampling steps (first, last) that a file is for; None: for every step."""
    found = engine.content.get("phase")
    return None if found is None else (found[0], found[1])


def per_sample(timestep: Tensor) -> Tensor:
    """Timesteps (B, N), of every token, as (B,). Raises UsageError where tokens of one sample differ."""
    if timestep.ndim < 2:
        return timestep
    first = timestep[:, 0]
    if not bool((timestep == first[:, None]).all()):
        raise UsageError(
            f"the pipeline gives a noise level for every token, {tuple(timestep.shape)}, and they differ; an exported file "
            "takes one for a sample: use the model itself"
        )
    return first


def facts_in(files: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The facts of exported files as `EngineModel.facts` gives them; only their export.json is read."""
    contents = sorted((record.opened(one)[1] for one in files), key=lambda one: one.get("phase") or [0])
    return [_facts(one) for one in contents]


def digests(facts: Sequence[Mapping[str, Any]]) -> str:
    """Facts of files, for people: names and the beginnings of digests."""
    return listed(f"{name} ({sha256[:12]})" for one in facts for name, sha256 in one["sha256"].items())


def recipe_hash(source: Any, overrides: tuple[str, ...], dtype: str) -> str:
    """The hash of a recipe, or of a built model's, as an export in `dtype` would have it."""
    return opened(source, overrides, dtype)[1].hash


def require_same_recipe(source: Any, overrides: tuple[str, ...], model: EngineModel) -> None:
    """Raise UsageError where `source`, a recipe or the folder of a built model, is not what the files were exported from;
    None is no recipe, and then there is nothing to override."""
    label = model.label
    if source is None:
        if overrides:
            raise UsageError(f"{label} is exported: key=value changes nothing in it any more, got {overrides[0]!r}")
        return
    due = model.plan.hash
    given = recipe_hash(source, overrides, model.plan.resolved.dtype)
    if given != due:
        raise UsageError(
            f"{source} is not what {label} was exported from: its recipe has hash {given[:12]}, the exported one {due[:12]}; "
            "leave the recipe out, which the file brings along, or export again"
        )


def _facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file by its digest, and that of the weights where they are a file of their own."""
    files = {name: one["sha256"] for name, one in content["files"].items() if name != PROOF}
    return {"target": content["target"], "phase": content.get("phase"), "sha256": files}


def _plan_of(engine: Engine) -> Plan:
    content = engine.content
    name = content["recipe"].get("backbone", {}).get("name")
    if name not in NATIVE or tuple(port.name for port in engine.ports) != ENTRIES:
        raise UsageError(
            f"{engine.file} is a {name!r} model, and no pipeline calls one; pipelines call {listed(NATIVE)}"
        )
    plan = assemble.plan_of(content["recipe"])
    if plan.hash != content["hash"]:
        raise UsageError(
            f"{Path(engine.file).parent / record.FILE}: its recipe has hash {plan.hash[:12]} here and "
            f"{content['hash'][:12]} when it was exported; the file was edited, or ultrazoo {content['ultrazoo']} read it "
            "differently; export again"
        )
    return plan


def _in_order(engines: list[Engine]) -> list[Engine]:
    """Engines by their phase. Raises UsageError where they are not the phases of one model."""
    if not engines:
        raise UsageError("an engine needs a file: give what `ultrazoo export` wrote")
    first = engines[0]
    for one in engines[1:]:
        for key, what in (("hash", "recipe"), ("weights", "weights"), ("device", "device")):
            a, b = (_digest(engine.content[key]) for engine in (first, one))
            if a != b:
                raise UsageError(
                    f"{first.file} and {one.file} are not phases of one model: their {what} differ ({a[:12]}, {b[:12]})"
                )
    if len(engines) == 1:
        return engines
    if whole := [one for one in engines if phase_of(one) is None]:
        raise UsageError(f"{whole[0].file} is for every step; give it alone")
    engines = sorted(engines, key=lambda one: _steps(one)[0])
    for before, after in itertools.pairwise(engines):
        if _steps(after)[0] <= _steps(before)[-1]:
            raise UsageError(f"{before.file} and {after.file} are both for {_shown(_steps(after))}; give one of them")
    return engines


def _digest(value: Any) -> str:
    return str(value["digest"] if isinstance(value, Mapping) else value)


def _steps(engine: Engine) -> range:
    first, last = phase_of(engine) or (0, -1)
    return range(first, last + 1)


def _shown(steps: range) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"
