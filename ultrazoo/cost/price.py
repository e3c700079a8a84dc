"""Price a model before it exists: FLOPs and parameters per layer, totals, a clip, memory, fits and seconds.

All counts are exact integers for batch 1, forward. FLOPs count matmul, convolution and attention, 2 per multiply-add;
norms, activations, softmax and rotary embedding are left out of FLOPs and appear in seconds as bytes moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..grid import Grid
from ..spec import AttentionSpec, BackboneCost, BackboneSpec, BranchCost, Companion, Cost, Site
from .memory import ELEMENT_BYTES, ByMode, Fit, activation_bytes, fits, memory_bytes
from .seconds import Seconds, Work, predict, work


class StepsLike(Protocol):
    """Sampling steps `first` to `last` (inclusive) run `layers[i]` in layer i instead of the layer map's attention."""

    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def layers(self) -> Mapping[int, AttentionSpec]: ...


class SamplingLike(Protocol):
    """How a clip is sampled: `steps`, and the guidance scale or None."""

    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float | None: ...


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan.

    `attention` is the name of what runs, `written` that of the recipe (they differ for named compositions).
    `pairs` are query-key pairs computed, ``keys_per_query = pairs / N``. `projection_flops`: queries, keys, values and
    output; `other_flops`: compression, lifts and gates of the attention, and the rest of the layer.
    `extra_parameters` are the attention's own, alternatives for other sampling steps included. `peak_bytes`: most bytes
    alive at once inside the attention, beside its input, at batch 1 and inference, with the map that it keeps between steps
    (in the machine's memory). `full_pairs`: what full attention computes there.
    """

    layer: int
    attention: str
    written: str
    pairs: int
    keys_per_query: float
    attention_flops: int
    projection_flops: int
    other_flops: int
    extra_parameters: int
    branches: tuple[BranchCost, ...]
    start: str
    pairs_min: int | None = None
    pairs_max: int | None = None
    visited_pairs: int | None = None
    peak_bytes: int = 0
    full_pairs: int = 0

    @property
    def flops(self) -> int:
        return self.attention_flops + self.projection_flops + self.other_flops

    @property
    def visited(self) -> int:
        """Query-key pairs that kernels compute, masked ones included."""
        return self.pairs if self.visited_pairs is None else self.visited_pairs

    @property
    def visited_share(self) -> float:
        """`visited` over full attention's pairs; 0 where nothing says how many those are."""
        return self.visited / self.full_pairs if self.full_pairs else 0.0

    def data(self) -> dict[str, object]:
        """The layer as it stands in plan.json."""
        return {
            "layer": self.layer,
            "attention": self.attention,
            "pairs": self.pairs,
            "keys_per_query": self.keys_per_query,
            "attention_flops": self.attention_flops,
            "projection_flops": self.projection_flops,
            "other_flops": self.other_flops,
            "extra_parameters": self.extra_parameters,
            "branches": [
                {
                    "name": branch.name,
                    "pairs": branch.pairs,
                    "attention_flops": branch.attention_flops,
                    "projection_flops": branch.projection_flops,
                    "other_flops": branch.other_flops,
                    "parameters": branch.parameters,
                }
                for branch in self.branches
            ],
        }


@dataclass(frozen=True)
class Totals:
    """Sums over the model for one forward. `attention_speedup`: full attention's attention FLOPs
    over these, None where no layer computes query-key pairs.
    """

    attention_flops: int
    projection_flops: int
    other_flops: int
    parameters: int
    extra_parameters: int
    attention_speedup: float | None
    weight_bytes: int
    activation_bytes: ByMode

    @property
    def flops(self) -> int:
        return self.attention_flops + self.projection_flops + self.other_flops

    def data(self) -> dict[str, object]:
        """The totals as they stand in plan.json."""
        return {
            "attention_flops": self.attention_flops,
            "projection_flops": self.projection_flops,
            "other_flops": self.other_flops,
            "parameters": self.parameters,
            "extra_parameters": self.extra_parameters,
            "attention_speedup": self.attention_speedup,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes.data(),
        }


@dataclass(frozen=True)
class Clip:
    """A whole sampling run: `forwards` = steps, doubled with guidance; `flops` with every step's own attention."""

    forwards: int
    flops: int

    def data(self) -> dict[str, int]:
        return {"forwards": self.forwards, "flops": self.flops}


@dataclass(frozen=True)
class Priced:
    """Everything the cost model says about one model at one grid. `memory` is weights or training state + activations.

    `companions` run beside the transformer, counted for one clip and in nothing else here.
    """

    layers: tuple[LayerPlan, ...]
    totals: Totals
    clip: Clip
    memory: ByMode
    fits: tuple[Fit, ...]
    seconds: tuple[Seconds, ...]
    dtype: str
    companions: tuple[Companion, ...] = ()


def full_flops(site: Site) -> int:
    """Attention FLOPs of full attention at `site`: ``4 * (N + M)^2 * heads * head_dim``, M the extra tokens."""
    tokens = site.tokens + site.extra_tokens
    return 4 * tokens * tokens * site.inner


def guided(guidance: float | None) -> bool:
    """Whether a guidance scale needs two forwards per step: ``uncond + g * (cond - uncond)`` needs one at 0 and 1."""
    return guidance is not None and guidance not in (0.0, 1.0)


def price(
    backbone: BackboneSpec,
    sites: Sequence[Site],
    attention: Sequence[AttentionSpec],
    *,
    grid: Grid,
    steps: Sequence[StepsLike] = (),
    sampling: SamplingLike | None = None,
    dtype: str = "bfloat16",
    written: Sequence[AttentionSpec] = (),
) -> Priced:
    """Price a backbone whose layer i runs `attention[i]` at `sites[i]`.

    `steps` replace attentions at some sampling steps; they count in the clip, in parameters and in memory, while layers
    and totals show the layer map. `written` are the specs before compositions were expanded. A clip without `sampling`
    is one forward. Raises KeyError for a dtype without a size.
    """
    rest = backbone.cost(grid)
    count = sampling.steps if sampling else 0
    costs = [
        spec.cost(site.at(runs=_runs(i, steps, count)))
        for i, (spec, site) in enumerate(zip(attention, sites, strict=True))
    ]
    alternatives = [
        {i: spec.cost(sites[i].at(runs=tuple(range(one.first, one.last + 1)))) for i, spec in one.layers.items()}
        for one in steps
    ]
    layers = _layers(rest, sites, attention, written or attention, costs, alternatives, ELEMENT_BYTES[dtype])

    extra = sum(layer.extra_parameters for layer in layers)
    parameters = rest.parameters + extra
    activations = activation_bytes(rest, sites, costs, dtype)
    for phase in alternatives:
        activations = _larger(activations, activation_bytes(rest, sites, _phase(costs, phase), dtype))
    totals = _totals(rest, sites, layers, parameters, extra, activations, dtype)

    forward = work(rest, costs, parameters, dtype)
    clip, clip_work = _clip(rest, costs, steps, alternatives, sampling, parameters, dtype)
    memory = memory_bytes(parameters, activations, dtype)
    seconds = predict(forward, clip_work if sampling else None, dtype)
    beside = backbone.companions(grid, 2 if sampling and guided(sampling.guidance) else 1)
    return Priced(layers, totals, clip, memory, fits(memory), seconds, dtype, beside)


def _runs(layer: int, steps: Sequence[StepsLike], count: int) -> tuple[int, ...] | None:
    """The sampling steps at which a layer runs the attention of the layer map; None for all, and where it never does."""
    replaced = {step for one in steps if layer in one.layers for step in range(one.first, one.last + 1)}
    return tuple(step for step in range(count) if step not in replaced) or None if replaced else None


def _layers(
    rest: BackboneCost,
    sites: Sequence[Site],
    attention: Sequence[AttentionSpec],
    written: Sequence[AttentionSpec],
    costs: Sequence[Cost],
    alternatives: Sequence[Mapping[int, Cost]],
    size: int,
) -> tuple[LayerPlan, ...]:
    rows = []
    for i, (site, spec, cost) in enumerate(zip(sites, attention, costs, strict=True)):
        rows.append(
            LayerPlan(
                layer=i,
                attention=spec.name,
                written=written[i].name,
                pairs=cost.pairs,
                keys_per_query=cost.pairs / site.tokens,
                attention_flops=cost.attention_flops,
                projection_flops=cost.all_projection_flops,
                other_flops=cost.other_flops + rest.layer_flops[i],
                extra_parameters=cost.parameters + sum(phase[i].parameters for phase in alternatives if i in phase),
                branches=cost.branches,
                start=str(written[i].traits().start),
                pairs_min=cost.pairs_min,
                pairs_max=cost.pairs_max,
                visited_pairs=cost.visited_pairs,
                peak_bytes=size * cost.peak_elements + cost.kept_bytes,
                full_pairs=(site.tokens + site.extra_tokens) ** 2,
            )
        )
    return tuple(rows)


def _totals(
    rest: BackboneCost,
    sites: Sequence[Site],
    layers: Sequence[LayerPlan],
    parameters: int,
    extra: int,
    activations: ByMode,
    dtype: str,
) -> Totals:
    attention = sum(layer.attention_flops for layer in layers)
    full = sum(full_flops(site) for site in sites)
    return Totals(
        attention_flops=attention,
        projection_flops=sum(layer.projection_flops for layer in layers),
        other_flops=rest.outside_flops + sum(layer.other_flops for layer in layers),
        parameters=parameters,
        extra_parameters=extra,
        attention_speedup=full / attention if attention else None,
        weight_bytes=parameters * ELEMENT_BYTES[dtype],
        activation_bytes=activations,
    )


def _phase(costs: Sequence[Cost], changes: Mapping[int, Cost]) -> list[Cost]:
    return [changes.get(i, cost) for i, cost in enumerate(costs)]


def _larger(a: ByMode, b: ByMode) -> ByMode:
    return ByMode(max(a.infer, b.infer), max(a.train, b.train), max(a.train_checkpointed, b.train_checkpointed))


def _clip(
    rest: BackboneCost,
    costs: Sequence[Cost],
    steps: Sequence[StepsLike],
    alternatives: Sequence[Mapping[int, Cost]],
    sampling: SamplingLike | None,
    parameters: int,
    dtype: str,
) -> tuple[Clip, Work]:
    """Add up the sampling steps; steps with the same set of active ranges share one computation."""
    count = sampling.steps if sampling else 1
    passes = 2 if sampling and guided(sampling.guidance) else 1
    flops, total = 0, Work(0, 0, 0)
    priced: dict[tuple[int, ...], tuple[int, Work]] = {}
    for step in range(count):
        active = tuple(k for k, one in enumerate(steps) if sampling and one.first <= step <= one.last)
        if active not in priced:
            now = list(costs)
            for k in active:
                now = _phase(now, alternatives[k])
            one = work(rest, now, parameters, dtype)
            priced[active] = (one.linear_flops + sum(cost.attention_flops for cost in now), one)
        step_flops, step_work = priced[active]
        flops += step_flops * passes
        total = total + step_work.times(passes)
    return Clip(count * passes, flops), total
