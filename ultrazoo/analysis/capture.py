"""Recording queries, keys and values of a model while it runs, file by file, bounded in size.

A hook in front of each attention makes them once more through the live host (projection, norm, rotation in the host's own
order), so what is written is what full attention would see, whatever design runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import inplace
from ..attention.contract import Attention, Call, grid_positions
from ..errors import OutputError, UsageError, listed
from ..grid import Grid
from ..ops import init
from ..recipe.layers import Axis, assign
from ..spec import Segment, Site
from ..weights.disk import human
from ..weights.slots import attention_paths, seeded
from .capture_files import INDEX, Capture, Item, ModelFacts, host_key, item_name, same_request, write_tensors
from .capture_host import close, projections
from .probe_host import turned

LIMIT_BYTES = 4 * 10**9


class Enough(Exception):
    """Everything that was asked of a run is recorded. Not an error: it ends a sampling run early."""


def chosen(key: str, groups: Mapping[str, int], item: str, whole: str) -> tuple[int, ...]:
    """What a key as recipes write them (``0-2``, ``first3``, ``*``) says of layers, heads or steps. Raises UsageError."""
    holders, problems = assign([key], Axis(groups, item, whole), item + "s")
    if problems:
        raise UsageError("; ".join(f"{one.rule}; {one.fix}".rstrip("; ") for one in problems))
    return tuple(index for index, holder in enumerate(holders) if holder is not None)


@contextlib.contextmanager
def capture(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    layers: str = "*",
    heads: str = "*",
    steps: Collection[int] | None = None,
    inputs: bool = False,
    limit: int = LIMIT_BYTES,
) -> Iterator[Recorder]:
    """Record every forward of a loaded model inside the ``with`` block into the directory `out`.

    `model` is a native backbone, a model that `apply` changed, or any that it could change: it runs full attention
    meanwhile. Forwards are counted by ``model.select(step, count)`` where it was called, else one after the other; set
    ``recorder.sample`` to tell samples apart. `layers` and `heads` are keys as in recipes; `steps` says which of the forwards
    so counted are kept, None all. `inputs` keeps the input of
    each block and its projections as well, which designs need that compress before they project. `limit` is in bytes.

    The same call continues a capture that was cut off. Raises UsageError for what cannot be captured or would pass the
    limit, OutputError for a place that cannot be written or holds another capture.
    """
    applied = not hasattr(model, "session")
    if applied:
        size = {"grid": [1, 8, 8]}
        inplace.apply(model, {"name": "capture", "video": size, "attention": {"*": {"name": "full"}}})
    try:
        wanted = None if steps is None else sorted(steps)
        request = {"by": "python", "layers": layers, "heads": heads, "steps": wanted, "inputs": inputs}
        with Recorder(
            {"": model}, out, request, layers=layers, heads=heads, steps=steps, inputs=inputs, limit=limit
        ) as recorder:
            yield recorder
    finally:
        if applied:
            inplace.remove(model)


class Recorder:
    """Hooks in models by component name, and the capture they write. Use as a context manager.

    `steps` are the sampling steps wanted, None all; `samples` how many samples there will be, so that `Enough` can be
    raised after the last item of each, None never. `rows` are the samples of a batch to keep.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        out: str | os.PathLike[str],
        request: Mapping[str, Any],
        *,
        layers: str = "*",
        heads: str = "*",
        inputs: bool = False,
        limit: int = LIMIT_BYTES,
        steps: Collection[int] | None = None,
        rows: slice = slice(None),
        ends: bool = False,
    ):
        facts = {name: facts_of(model) for name, model in models.items()}
        first = next(iter(facts.values()))
        self.models = models
        self.layers = chosen(layers, first.groups, "layer", first.model)
        self.heads = chosen(heads, {"": first.site.heads}, "head", first.model)
        if inputs and len(self.heads) != first.site.heads:
            raise UsageError("block inputs are of all heads at once: capture them without --heads")
        self.steps = None if steps is None else frozenset(steps)
        self.rows, self.limit, self.ends = rows, limit, ends
        self.sample = 0
        self.written = 0
        self._forwards = dict.fromkeys(models, -1)
        self._handles: list[Any] = []
        self.capture = _opened(Path(out), request, facts, self.heads, inputs)
        self._have = {item.file for item in self.capture.items if self.capture.whole(item)}

    def __enter__(self) -> Recorder:
        for component, model in self.models.items():
            found = blocks(model)
            missing = [layer for layer in self.layers if layer not in found]
            if missing:
                self.__exit__(UsageError)
                raise UsageError(
                    f"layers {listed(map(str, missing))} of {type(model).__name__} run the model's own attention, which "
                    "does not pass through ultrazoo: apply a recipe with full there"
                )
            self._handles.append(model.register_forward_pre_hook(self._counting(component)))
            for layer in self.layers:
                self._handles.append(found[layer].register_forward_pre_hook(self._recording(component, layer)))
        return self

    def __exit__(self, kind: Any = None, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None and self.capture.items:
            self.capture = replace(self.capture, complete=True)
            self.capture.save()

    def lacks(self, sample: int) -> bool:
        """Whether anything of `sample` is still to be recorded; its steps must be known."""
        assert self.steps is not None
        # of two models, one runs the early steps and the other the late ones
        return any(
            all(item_name(name, sample, step, layer) not in self._have for name in self.models)
            for step in self.steps
            for layer in self.layers
        )

    def _counting(self, component: str) -> Any:
        def begins(*_: Any) -> None:
            self._forwards[component] += 1

        return begins

    def _recording(self, component: str, layer: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, host, call = args
            number = self._forwards[component] if call.step is None else call.step[0]
            if self.steps is not None and number not in self.steps:
                if self.ends and number > max(self.steps):
                    raise Enough
                return
            if _beside(call.branch):
                return
            file = item_name(component, self.sample, number, layer)
            if file not in self._have:
                with torch.no_grad():
                    self._write(component, file, layer, x, host, call)

        return record

    def _write(self, component: str, file: str, layer: int, x: Tensor, host: Any, call: Call) -> None:
        q, k, v = host.heads(*host.project(x, "qkv"), grid_positions(call.grid, x.device))
        facts = self.capture.models[component]
        if not any(item.component == component for item in self.capture.items):
            facts = replace(facts, turns=_turns(facts, x, host, call, q))
            self.capture = replace(self.capture, models={**self.capture.models, component: facts})
        tensors = self._tensors(x, q, k, v, call)
        key = host_key(component, layer)
        host_tensors, notes = self._host(key, host, x, facts.site)
        need = sum(z.numel() * z.element_size() for z in [*tensors.values(), *host_tensors.values()])
        if self.capture.nbytes + need > self.limit:
            raise UsageError(
                f"{self.capture.directory} holds {human(self.capture.nbytes)} and the next file has {human(need)}: together "
                f"more than the limit of {human(self.limit)}. What is there is whole and can be probed; take fewer layers, "
                "steps or heads, or raise the limit and run the same again"
            )
        if host_tensors:
            name = f"host-{key}.safetensors"
            write_tensors(self.capture.directory / name, host_tensors, notes)
            self.capture = replace(self.capture, hosts={**self.capture.hosts, key: name})
        size = write_tensors(self.capture.directory / file, tensors)
        frame = getattr(host, "frame", None)
        places = None if frame is None else frame.coordinates
        self.capture = self.capture.with_item(
            Item(
                file,
                component,
                self.sample,
                call.step,
                layer,
                Grid(*call.grid),
                tensors["q"].shape[0],
                str(q.dtype).removeprefix("torch."),
                size,
                _segments(call),
                None if places is None else tuple(tuple(axis.double().tolist()) for axis in places),
            )
        )
        self.capture.save()
        self._have.add(file)
        self.written += 1

    def _host(self, key: str, host: Any, x: Tensor, site: Site) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Projections and norms of a layer, where they are asked for and neither there nor of a kind that nobody knows."""
        file = self.capture.hosts.get(key)
        if not self.capture.inputs or (file is not None and (self.capture.directory / file).is_file()):
            return {}, {}
        found = projections(host, x, site)
        return ({}, {}) if isinstance(found, str) else found

    def _tensors(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        heads = list(self.heads)

        def of_heads(z: Tensor) -> Tensor:
            return z[self.rows][:, :, heads]

        found = {"q": of_heads(q), "k": of_heads(k), "v": of_heads(v)}
        extra = call.extra
        if extra is not None:
            found |= {"extra_q": of_heads(extra.q), "extra_k": of_heads(extra.k), "extra_v": of_heads(extra.v)}
            if extra.key_mask is not None:
                found["extra_mask"] = extra.key_mask[self.rows]
        if call.key_valid is not None:
            found["key_valid"] = call.key_valid[self.rows]
        if call.timestep is not None:
            batch = x.shape[0]
            moment = (
                call.timestep.expand(batch, *call.timestep.shape[1:]) if call.timestep.shape[0] == 1 else call.timestep
            )
            found["timestep"] = moment[self.rows].float()
        if self.capture.inputs:
            found["x"] = x[self.rows]
        return found


def _beside(branch: str | None) -> bool:
    """Whether a forward only guides the prompt's own at the same step: it has an empty prompt, or a part perturbed.

    Pipelines name forwards: ``uncond``, ``pred_uncond``, LTX-2's ``uncond_stg``; its ``cond_uncond`` is a batch of both.
    """
    return branch is not None and "uncond" in branch and not branch.startswith("cond")


def blocks(model: nn.Module) -> dict[int, Attention]:
    """The attention of every layer that is ours: the outermost where a design holds others."""
    found: dict[int, Attention] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Attention) and not any(path.startswith(f"{one}.") for one in inside):
            inside.append(path)
            found[module.site.layer] = module
    return found


def facts_of(model: nn.Module) -> ModelFacts:
    """What an index says about a model. Raises UsageError for one whose own attention is not softmax."""
    session: Any = getattr(model, "session", None)
    if session is None:
        raise UsageError(f"{type(model).__name__} runs no attention of ultrazoo: nothing can be captured")
    spec = session.spec
    adapter = getattr(spec, "adapter", None)
    if adapter is not None and not adapter().softmax:
        raise UsageError(
            f"{adapter().model} was trained with an attention that is not softmax attention: it has no queries and keys that "
            "full attention could be compared on"
        )
    name = spec.name if adapter is None else f"{spec.name}/{adapter().model}"
    weights = "random" if fresh(model) else "loaded"
    return ModelFacts(type(model).__name__, name, dict(spec.groups()), session.sites[0], False, weights)


def fresh(model: nn.Module) -> bool:
    """Whether the first matrices of a built model are still those that its seed gives."""
    plan: Any = getattr(model, "plan", None)
    origin: Any = getattr(model, "origin", None) or {}
    if plan is None or origin.get("applied") or origin.get("weights"):
        return False
    owners = dict(model.named_modules())
    own = tuple(f"{path}." for path in attention_paths(model))
    names = [name for name, one in model.named_parameters() if one.ndim == 2 and not name.startswith(own)]
    for name in names[:3]:
        path, _, last = name.rpartition(".")
        value = init.value_of(owners[path], last)
        parameter = owners[path].get_parameter(last)
        start = init.make(value, parameter.shape, seeded(plan.resolved.seed, name))
        if not torch.equal(start.to(parameter.dtype), parameter.detach().cpu()):
            return False
    return bool(names)


def _opened(
    out: Path, request: Mapping[str, Any], facts: Mapping[str, ModelFacts], heads: tuple[int, ...], inputs: bool
) -> Capture:
    """A new capture, or the one that is there if it is of the same request and model."""
    if (out / INDEX).is_file():
        old = Capture.load(out)
        same_request(old, request)
        for name, one in facts.items():
            if name not in old.models or replace(old.models[name], turns=False) != replace(
                one, site=_bare(one), turns=False
            ):
                raise OutputError(f"{out} holds a capture of another model; choose another place with -o")
        return replace(old, complete=False)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and holds no capture; choose another place with -o")
    plain = {name: replace(one, site=_bare(one)) for name, one in facts.items()}
    return Capture(out, request, plain, heads, inputs)


def _bare(facts: ModelFacts) -> Any:
    """The site without what differs between layers and sizes."""
    return ModelFacts.of(facts.data()).site


def _turns(facts: ModelFacts, x: Tensor, host: Any, call: Call, q: Tensor) -> bool:
    """Whether rotating by the facts alone gives the host's own q."""
    if facts.site.rope is None:
        return True
    plain, _, _ = host.heads(host.project(x, "q"), None, None, None)
    frame = getattr(host, "frame", None)
    places = None if frame is None else frame.coordinates
    return close(turned(plain, grid_positions(call.grid, x.device), facts.site.rope, places), q)


def _segments(call: Call) -> tuple[Segment, ...]:
    if call.extra is None:
        return ()
    return call.extra.segments or (Segment("extra", call.extra.k.shape[1]),)


def item_bytes(facts: ModelFacts, tokens: int, extra: int, heads: int, inputs: bool, itemsize: int) -> int:
    """Bytes of one item of one sample: three times `heads` of grid and extra tokens, and the block's input."""
    site = facts.site
    return itemsize * (3 * (tokens + extra) * heads * site.head_dim + (tokens * site.dim if inputs else 0)) + 4096
