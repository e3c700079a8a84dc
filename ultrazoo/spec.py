"""The protocol of registered parts, without torch: sites, specs, traits and costs.

A **spec** is a frozen dataclass with a part's options. It checks, prices and explains itself for a **site** (the facts
of one attention in one model at one size), so that a plan can be made before anything is built. The modules that run
stand beside their spec, in the same file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .errors import Problem, UsageError
from .grid import Grid
from .ports import EXPORTS, Port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

CONTRACT = 1
"""Version of the protocol below. A part says which one it speaks in `Spec.contract`."""

Tree = Any
"""Annotation of an option that is a name or a nested list of names: ``[a, [b, c]]``."""


class Data:
    """Annotation of an option that takes any plain data (what JSON can hold) and keeps it as it is."""


def option(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    kind: str | None = None,
    choices: Mapping[str, type] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare one option of a spec: its default, one line of documentation and the values allowed.

    `kind` says that the value is a registered part of that kind; `choices` that it is one of a closed table of named
    option groups. The bounds hold for every number in the value.
    """
    metadata = {"doc": doc, "kind": kind, "choices": choices, "ge": ge, "gt": gt, "le": le, "lt": lt}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options inside a spec. Not registered; a `name` only where it stands in a table of choices."""

    name: ClassVar[str] = ""

    def problems(self, site: Site) -> list[Problem]:
        """Everything wrong with these options at `site`, paths relative to the group."""
        return []


@dataclass(frozen=True)
class Rope:
    """The host's rotary embedding: channels per axis, base, pairing of channels, and the sizes it was trained at.

    `axes` are even and add up to at most the head dimension (the rest passes unrotated).
    """

    axes: tuple[int, int, int]
    base: float = 10000.0
    pairing: Literal["interleaved", "halves"] = "interleaved"
    trained: Grid | None = None


@dataclass(frozen=True)
class Segment:
    """A run of extra tokens. `rows`: do its queries see everything, or what the pattern gives them? `keys`: are its keys
    seen by all, or selectable like blocks of the grid? Raises UsageError for another policy or a length below 0."""

    kind: str
    length: int
    grid: Grid | None = None
    rows: Literal["dense", "pattern"] = "dense"
    keys: Literal["always", "compete"] = "always"

    def __post_init__(self) -> None:
        for name, allowed in (("rows", ("dense", "pattern")), ("keys", ("always", "compete"))):
            got = getattr(self, name)
            if got not in allowed:
                raise UsageError(f"segment {self.kind!r}: {name} is {' or '.join(allowed)}, got {got!r}")
        # a length may be symbolic while a model is exported
        plain = isinstance(self.length, int | float | str | None)
        if plain and (isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 0):
            raise UsageError(f"segment {self.kind!r}: length is a number of tokens, 0 or more, got {self.length!r}")


@dataclass(frozen=True)
class Site:
    """The torch-free facts of one place where attention happens.

    `heads` are the heads this attention computes; `host_heads` those the host projects (they differ only inside
    `by_head`). `heads * head_dim` need not equal `dim`, the channels of the stream. `steps` are the sampling steps of a clip,
    None where nobody says, `runs` those at which this attention runs, None for all.
    """

    dim: int
    heads: int
    head_dim: int
    layer: int = 0
    layers: int = 1
    grid: Grid = Grid(1, 1, 1)
    extra: tuple[Segment, ...] = ()
    qk_norm: bool = False
    rope: Rope | None = None
    has_timestep: bool = True
    host_heads: int | None = None
    steps: int | None = None
    runs: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    @property
    def extra_tokens(self) -> int:
        return sum(segment.length for segment in self.extra)

    @property
    def inner(self) -> int:
        """Channels of this attention's output before the output projection."""
        return self.heads * self.head_dim

    @property
    def width(self) -> int:
        """Channels of the host's raw projections."""
        return (self.host_heads or self.heads) * self.head_dim

    def at(self, **changes: Any) -> Site:
        return replace(self, **changes)


@dataclass(frozen=True)
class Start:
    """How a fresh block behaves on pretrained weights, and who says so."""

    kind: Literal["exact", "training-free", "needs tuning"]
    source: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.source})" if self.source else self.kind


@dataclass(frozen=True)
class Traits:
    """What a design needs and promises. Every promise is checked by the contract suite.

    `exact_at_init`: a fresh block equals full attention with the host's weights. `visible`: whether `Spec.visible` is
    exact or an upper bound. `export`: the targets that hold the design with open sizes. `min_grid`: the smallest (T, H, W) at which an export with dynamic sizes is valid.
    `selects`: the data decides which keys a query visits, so pairs lie between `pairs_min` and `pairs_max` and kernels may
    compute padding. `softmax`: all attention goes through the kernel door as pairs; False for linear, recurrent and
    factored designs. `fullgraph`: compiles as one graph. `frozen`: own parameters that are used and not trained, by name.
    """

    start: Start
    needs: frozenset[str] = frozenset()
    exact_at_init: bool = False
    export: tuple[str, ...] = EXPORTS
    visible: Literal["exact", "upper bound"] = "exact"
    extra: bool = True
    key_valid: bool = True
    min_grid: tuple[int, int, int] = (2, 2, 2)
    selects: bool = False
    softmax: bool = True
    fullgraph: bool = True
    frozen: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class BranchCost:
    """One branch's share of `Cost`."""

    name: str
    pairs: int
    attention_flops: int
    projection_flops: int = 0
    other_flops: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Cost:
    """Cost of one attention for batch 1, forward. FLOPs count matmul, convolution and attention, 2 per multiply-add.

    `pairs`: query-key pairs computed, summed over branches after compression and averaged over heads (so that attention
    FLOPs are ``4 * pairs * heads * head_dim``); `pairs_min` and `pairs_max` where the data decides. `visited_pairs` adds
    what kernels compute and mask, or compute for slots that no token fills; None where that is nothing. `qkv_flops`: the host's own projections of the unchanged input, done once
    whoever shares them; `projection_flops`: every other projection of queries, keys and values; `out_flops`: the output
    projection. `peak_elements`: most tensor elements alive at once inside the forward, beside the input; `saved_elements`:
    what autograd keeps for the backward. `kept_bytes`: what stays in the call's state between steps, in the machine's memory,
    for each guidance branch.
    """

    pairs: int
    attention_flops: int
    qkv_flops: int = 0
    projection_flops: int = 0
    out_flops: int = 0
    other_flops: int = 0
    parameters: int = 0
    visited_pairs: int | None = None
    pairs_min: int | None = None
    pairs_max: int | None = None
    peak_elements: int = 0
    saved_elements: int = 0
    kept_bytes: int = 0
    branches: tuple[BranchCost, ...] = ()

    @property
    def visited(self) -> int:
        """Query-key pairs that kernels compute."""
        return self.pairs if self.visited_pairs is None else self.visited_pairs

    @property
    def flops(self) -> int:
        return self.attention_flops + self.all_projection_flops + self.other_flops

    @property
    def all_projection_flops(self) -> int:
        return self.qkv_flops + self.projection_flops + self.out_flops


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Options of a registered part. Subclasses set `kind`, `name` and, where they run, `module`.

    `name` is the name in the registry (``vendor/name`` for plugins); `source` a citation.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    contract: ClassVar[int] = CONTRACT
    minimal: ClassVar[Mapping[str, Any]] = {}
    """Options that the smallest useful recipe gives, as recipe data; for parts that cannot be written by name alone."""
    beside: ClassVar[Mapping[str, Any]] = {}
    """Options that the attention around a part gives there, for parts that need them."""

    def problems(self, site: Site) -> list[Problem]:
        """Everything wrong with these options at `site`, paths relative to this node."""
        return []


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(Spec):
    """A spec of kind `attention`. `module` is the class that runs it: ``module(spec, site)``."""

    kind: ClassVar[str] = "attention"
    module: ClassVar[Any] = None
    formula: ClassVar[str] = ""
    """What is computed, in one line of plain text."""

    def expand(self, site: Site) -> AttentionSpec:
        """Named compositions return what they stand for at `site`; every other spec returns itself."""
        return self

    def cost(self, site: Site) -> Cost:
        """Price this attention at `site`, batch 1, forward. A named composition costs what it stands for."""
        expanded = self.expand(site)
        if expanded is not self:
            return expanded.cost(site)
        raise TypeError(f"{type(self).__name__} does not say what it costs")

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        """Which tokens each query's output may depend on: bool (1 or heads, queries, N); None means all queries."""
        expanded = self.expand(site)
        if expanded is not self:
            return expanded.visible(site, queries)
        raise TypeError(f"{type(self).__name__} does not say what it sees")

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray | None:
        """What sets of tokens may depend on: bool (sets, N) → (sets, N), the union of `visible` over each set.

        For designs that know it without a row per token, as at 685 440 tokens; None: take the union of rows.
        """
        expanded = self.expand(site)
        return None if expanded is self else expanded.reach(site, tokens)

    def traits(self) -> Traits:
        raise TypeError(f"{type(self).__name__} declares no traits")

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        """Specs and sites that the contract suite runs: small, odd, non-square."""
        return []

    def build(self, site: Site) -> Any:
        """The module that runs this spec at `site`; raises SiteError with every problem found."""
        from .errors import SiteError

        expanded = self.expand(site)
        if expanded is not self:
            return expanded.build(site)
        found = self.problems(site)
        if found:
            raise SiteError(f"attention {self.name!r} at layer {site.layer}", found)
        return self.module(self, site)


@dataclass(frozen=True)
class BackboneCost:
    """What a backbone costs beside its self-attention, for batch 1, forward.

    `parameters`: all of the model's own (host projections and norms included, attention extras not). `layer_flops[i]`:
    everything in layer i except self-attention and its projections. `outside_flops`: embeddings and head.
    `stream_elements`: the residual stream and what lives across a whole layer; `layer_peak_elements[i]`: most elements
    alive inside layer i outside its attention; `layer_saved_elements[i]`: what autograd keeps for it (attention aside).
    """

    parameters: int
    layer_flops: tuple[int, ...]
    outside_flops: int
    stream_elements: int
    layer_peak_elements: tuple[int, ...]
    layer_saved_elements: tuple[int, ...]


@dataclass(frozen=True)
class Companion:
    """A network that runs beside the transformer to make a clip: its role, name, parameters, FLOPs per clip, source."""

    role: str
    name: str
    parameters: int
    flops: int
    source: str = ""


@dataclass(frozen=True)
class Video:
    """The size of what is made: pixels and frames, or the token grid itself."""

    width: int | None = option(None, "pixels", ge=1)
    height: int | None = option(None, "pixels", ge=1)
    frames: int = option(1, "frames; 1 is an image", ge=1)
    grid: Grid | None = option(None, "tokens (T, H, W) instead of a size in pixels")


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(Spec):
    """A spec of kind `backbone`: the model around the attentions. `module` is built as ``module(spec, attentions, grid)``
    where `attentions[i]` is layer i's built attention spec (see `backbones/contract.py`)."""

    kind: ClassVar[str] = "backbone"
    module: ClassVar[Any] = None
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    minimal_video: ClassVar[Mapping[str, int]] = {"width": 832, "height": 480, "frames": 81}
    """The size that the smallest useful recipe gives."""

    def groups(self) -> dict[str, int]:
        """Layers per group in execution order; one unnamed group ``{"": n}`` where there is only one kind of block."""
        raise TypeError(f"{type(self).__name__} does not say how many layers it has")

    @property
    def layers(self) -> int:
        return sum(self.groups().values())

    def settled(self, beside: Callable[[str, str], Path]) -> tuple[BackboneSpec | None, str | None, list[Problem]]:
        """This spec with whatever it names in files read in, the checkpoint that it brings along, and problems.

        ``beside(option, path)`` turns the path that an option holds, as the recipe writes it, into one from here.
        """
        return self, None, []

    def grid(self, video: Video) -> tuple[Grid | None, list[Problem]]:
        """The token grid of a video, or the problems that prevent one, with the nearest legal sizes."""
        raise TypeError(f"{type(self).__name__} does not map sizes to grids")

    def sites(self, grid: Grid) -> tuple[Site, ...]:
        """One site per layer, in execution order."""
        raise TypeError(f"{type(self).__name__} has no sites")

    def ports(self, image: bool) -> tuple[Port, ...]:
        """The inputs of a forward in their order, for images or for videos; none where the model is another library's."""
        return ()

    def cost(self, grid: Grid) -> BackboneCost:
        raise TypeError(f"{type(self).__name__} does not say what it costs")

    def companions(self, grid: Grid, prompts: int = 1) -> tuple[Companion, ...]:
        """Text encoder and VAE decoder of this model for one clip, where they are known; `prompts` counts the negative
        prompt of guidance."""
        return ()
