"""One attention on one captured layer: output error, recall of softmax mass, visited share and time.

Everything is taken in front of the output projection, head by head. Error: RMS of the difference to full attention over RMS of
full attention, both on the captured numbers, full attention in fp32 and sums in fp64.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.contract import Call, Extra
from ..attention.full import FullSpec
from ..attention.standalone import reset_parameters
from ..errors import UltrazooError
from ..kernels import attend, record, watched
from ..ops.init import Copy, value_of
from ..spec import AttentionSpec, Site
from .capture_files import Capture, Item
from .probe_host import NEEDS_INPUT, CannotReplay, ReplayHost
from .probe_mass import Recall, Visits, recall, sampled

ENOUGH_S = 0.5
"""A call is repeated until it took so long in all, or `MOST_CALLS` times."""
MOST_CALLS = 5


@dataclass(frozen=True)
class Measured:
    """Figures of one attention at one item; error, recall per head. None where a figure does not exist: `why` by its name.

    `squares`: per head (sum of squared differences, sum of squares of full attention). `share`: query-key pairs that went
    through kernels, over those of full attention, extra tokens included. `seconds` without the host's own projections, norms
    and output.
    """

    error: tuple[float, ...]
    squares: tuple[tuple[float, float], ...]
    recall: tuple[float, ...] | None
    recall_low: float | None
    share: float | None
    seconds: float
    full_seconds: float
    kernel: str
    why: dict[str, str]


@dataclass
class Scene:
    """One item on a device, and full attention's answer to it: `full` (B, N, heads, D) fp32."""

    item: Item
    site: Site
    host: ReplayHost
    call: Call
    q: Tensor
    keys: Tensor
    valid: Tensor | None
    full: Tensor
    full_seconds: float
    full_kernel: str
    queries: Tensor


def scene(held: Capture, item: Item, device: torch.device, dtype: torch.dtype | None, queries: int) -> Scene:
    """Load an item and run full attention on it. `queries`: most of them that recall looks at."""
    model = held.models[item.component]
    tensors = held.tensors(item)
    kind = dtype or tensors["q"].dtype

    def there(name: str) -> Tensor | None:
        z = tensors.get(name)
        return None if z is None else z.to(device, kind if z.is_floating_point() else None)

    q, k, v = there("q"), there("k"), there("v")
    assert q is not None and k is not None and v is not None
    site = model.site.at(
        layer=item.layer,
        grid=item.grid,
        heads=len(held.heads),
        extra=item.segments,
        steps=None if item.step is None else item.step[1],
    )
    extra = None
    keys, values, valid = k, v, there("key_valid")
    if "extra_k" in tensors:
        extra = Extra(there("extra_q"), there("extra_k"), there("extra_v"), there("extra_mask"), item.segments)  # type: ignore[arg-type]
        keys, values = torch.cat([k, extra.k], dim=1), torch.cat([v, extra.v], dim=1)
        valid = _joined(q, valid, extra)
    weights = held.host(item.component, item.layer)
    host = ReplayHost(site, q, k, v, x=there("x"), weights=weights, turns=model.turns, coordinates=item.coordinates).to(
        device
    )
    moment = tensors.get("timestep")
    call = Call(
        grid=tuple(item.grid),  # type: ignore[arg-type]
        timestep=None if moment is None else moment.to(device),
        extra=extra,
        key_valid=there("key_valid"),
        step=item.step,
    )
    mask = None if valid is None else valid[:, None, None]
    wide = (z.float().transpose(1, 2) for z in (q, keys, values))
    answer = attend(*wide, key_mask=mask)
    assert isinstance(answer, Tensor)
    made = Scene(
        item, site, host, call, q, keys, valid, answer.transpose(1, 2), 0.0, "", sampled(item.grid.tokens, queries)
    )
    block = FullSpec().build(site)
    made.full_kernel = " + ".join(dict.fromkeys(run.kernel for run in _run(made, block)[1]))
    made.full_seconds = _seconds(made, block)
    return made


def measure(spec: AttentionSpec, scene: Scene, seed: int) -> Measured:
    """Run `spec`, expanded at the item's site, on the scene. Raises CannotReplay with what the capture lacks for it."""
    if found := spec.problems(scene.site):
        raise CannotReplay("; ".join(str(one) for one in found))
    block = _block(spec, scene, seed)
    visits = Visits(scene.q, scene.keys, scene.queries)
    scene.host.learn = visits.learn
    try:
        with watched(visits):
            y, runs = _run(scene, block)
    finally:
        scene.host.learn = None
    difference = (y.float() - scene.full).double().square().sum((0, 1, 3))
    reference = scene.full.double().square().sum((0, 1, 3))
    if not bool(torch.isfinite(difference).all()):
        raise CannotReplay("its output is not finite on these numbers")
    if not bool((reference > 0).all()):
        raise CannotReplay("full attention gives nothing but zeros in some head: there is no error relative to it")
    why: dict[str, str] = {}
    if not spec.traits().softmax:
        mass = Recall(None, "it is not softmax attention over keys")
    else:
        mass = recall(visits, scene.q, scene.keys, scene.valid)
    if mass.values is None:
        why["recall"] = mass.why
    elif mass.summaries:
        why["recall"] = "of keys that are visited themselves; keys that stand for several are not counted"
    batch, tokens, heads = scene.q.shape[:3]
    beside = 0 if scene.call.extra is None else scene.call.extra.k.shape[1]
    share = None
    if runs:
        share = sum(run.pairs for run in runs) / (batch * heads * (tokens + beside) ** 2)
        if not spec.traits().softmax:
            why["share"] = "of its softmax part; the rest has no pairs"
        elif any(run.kernel == "skip_softmax" for run in runs):
            why["share"] = "of scores; what the kernel leaves out after them is not counted"
    else:
        why["share"] = "no query-key pairs go through a kernel"
    values = None if mass.values is None else mass.values.double()
    return Measured(
        error=tuple((difference / reference).sqrt().tolist()),
        squares=tuple(zip(difference.tolist(), reference.tolist(), strict=True)),
        recall=None if values is None else tuple(values.mean((0, 2)).tolist()),
        recall_low=None if values is None else float(values.flatten().quantile(0.05)),
        share=share,
        seconds=_seconds(scene, block),
        full_seconds=scene.full_seconds,
        kernel=" + ".join(dict.fromkeys(run.kernel for run in runs)) or "plain arithmetic",
        why=why,
    )


class _Standing(nn.Module):
    """An attention beside its host, so that parameters that start as copies of the host's find them."""

    def __init__(self, host: nn.Module, attention: nn.Module):
        super().__init__()
        self.host, self.attention = host, attention


def _block(spec: AttentionSpec, scene: Scene, seed: int) -> nn.Module:
    block: nn.Module = spec.build(scene.site)
    for module in block.modules():
        for name, _ in module.named_parameters(recurse=False):
            value = value_of(module, name)
            which = value.source.partition(".")[0] if isinstance(value, Copy) else ""
            if which == "o":
                raise CannotReplay("it owns an output projection that starts as the model's, which no capture holds")
            if which and not hasattr(scene.host, which):
                raise CannotReplay(f"its own {which} projection starts as the model's, {NEEDS_INPUT}")
    reset_parameters(_Standing(scene.host, block), seed)
    return block.to(scene.q.device, scene.q.dtype).eval()


def _run(scene: Scene, block: nn.Module) -> tuple[Tensor, list[Any]]:
    """Output (B, N, heads, D) in front of the output projection, and what went through the kernel door."""
    host = scene.host
    host.heads_out = host.result = None
    before = [z._version for z in host.captured.values()]
    with torch.inference_mode(), record() as runs:
        found = block(host.x, host, scene.call)
    if before != [z._version for z in host.captured.values()]:
        raise UltrazooError(f"{block} writes into what its host gives it: the captured numbers are spoilt")
    y = found[0] if scene.call.extra is not None else found
    if host.heads_out is None or y is not host.result:
        raise CannotReplay(
            "it goes on after the model's output projection, so its output cannot be compared head by head with full attention"
        )
    heads, width = scene.q.shape[2:]
    return host.heads_out.unflatten(-1, (heads, width)), runs


def _seconds(scene: Scene, block: nn.Module) -> float:
    """Median time of a call, after the one that warmed up."""
    taken: list[float] = []
    cuda = scene.q.device.type == "cuda"
    while len(taken) < MOST_CALLS and sum(taken) < ENOUGH_S:
        if cuda:
            torch.cuda.synchronize(scene.q.device)
        start = time.perf_counter()
        with torch.inference_mode():
            block(scene.host.x, scene.host, scene.call)
        if cuda:
            torch.cuda.synchronize(scene.q.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _joined(q: Tensor, valid: Tensor | None, extra: Extra) -> Tensor | None:
    """Bool (B, N + M): which keys are real; None where all are."""
    if valid is None and extra.key_mask is None:
        return None
    grid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if valid is None else valid
    more = (
        torch.ones(extra.k.shape[:2], dtype=torch.bool, device=q.device) if extra.key_mask is None else extra.key_mask
    )
    return torch.cat([grid, more], dim=1)
