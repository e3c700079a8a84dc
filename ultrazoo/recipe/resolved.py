"""A recipe after every name was looked up: typed, expanded, checked, with the hash of what it means.

The hash is sha256 over sorted JSON of the expanded ``schema, backbone, attention, steps, video, sampling, dtype``, options
equal to their default left out: two recipes that mean the same model have the same hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, Literal

from .. import registry
from ..grid import Grid
from ..options import FrozenMap, to_data
from ..spec import AttentionSpec, BackboneSpec, Options, Site, Spec, Video, option
from .layers import spans

SCHEMA = 1

Dtype = Literal["bfloat16", "float16", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """The top-level entries of a recipe that are one value each."""

    schema: int = option(SCHEMA, "version of the recipe format")
    name: str = option("recipe", "names the output directory")
    summary: str = option("", "one line about the design")
    source: str = option("", "a citation")
    dtype: Dtype = option("bfloat16", "of the weights and activations")
    seed: int = option(0, "of the parameters' initial values", ge=0, lt=2**63)


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How a clip is sampled: denoising steps, and the scale of classifier-free guidance (null means none)."""

    steps: int = option(doc="denoising steps", ge=1, le=10_000)
    guidance: float | None = option(None, "scale of classifier-free guidance; null means none", ge=0)


@dataclass(frozen=True, kw_only=True)
class WeightsSource(Options):
    """A checkpoint to start from, and its key layout."""

    path: str = option(doc="file or directory, relative to the recipe's file")
    format: Literal["auto", "ultrazoo", "wan", "diffusers", "ultragen"] = option("auto", "key layout; auto detects it")


@dataclass(frozen=True)
class StepRange:
    """Sampling steps `first` to `last` (0-based, inclusive) run `layers[i]` in layer i instead of the layer map's."""

    first: int
    last: int
    layers: Mapping[int, AttentionSpec]


@dataclass(frozen=True)
class Resolved:
    """What a recipe stands for. `attention[i]` is layer i's spec after expansion, `written[i]` the one before it.

    `plugins` are rows ``{kind, name, distribution, version}`` of every part that is not built in.
    """

    name: str
    backbone: BackboneSpec
    video: Video
    grid: Grid
    sites: tuple[Site, ...]
    attention: tuple[AttentionSpec, ...]
    written: tuple[AttentionSpec, ...]
    summary: str = ""
    source: str = ""
    sampling: Sampling | None = None
    steps: tuple[StepRange, ...] = ()
    weights: WeightsSource | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    search: Mapping[str, Any] = field(default_factory=FrozenMap)

    @cached_property
    def hash(self) -> str:
        """Sha256 of what the recipe means, in hexadecimal."""
        meaning = {key: value for key, value in self._meaning().items() if value not in (None, {}, [])}
        text = json.dumps(_numbers(meaning), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def plugins(self) -> tuple[dict[str, str], ...]:
        rows = {}
        for spec in specs_of((self.backbone, self.written, self.attention, [one.layers for one in self.steps])):
            entry = registry.entry(spec.kind, spec.name)
            if not entry.builtin:
                rows[spec.kind, spec.name] = {
                    "kind": spec.kind,
                    "name": spec.name,
                    "distribution": entry.distribution,
                    "version": entry.version,
                }
        return tuple(rows[key] for key in sorted(rows))

    def data(self) -> dict[str, Any]:
        """The resolved recipe as plain data: nothing left to look up or expand; loads back to the same hash.

        A search space is left out: its paths name entries of the recipe as written.
        """
        meaning = self._meaning()
        data = {
            "schema": SCHEMA,
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            **{key: meaning[key] for key in ("video", "sampling", "backbone", "attention", "steps")},
            "weights": to_data(self.weights),
            "dtype": self.dtype,
            "seed": self.seed,
        }
        always = ("weights", "seed")
        return {key: value for key, value in data.items() if key in always or value not in (None, "", {})}

    def _meaning(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "backbone": to_data(self.backbone),
            "attention": layer_map(dict(enumerate(self.attention)), len(self.attention)),
            "steps": {_step_key(one): layer_map(one.layers, len(self.attention)) for one in self.steps},
            "video": size_data(self.video),
            "sampling": to_data(self.sampling),
            "dtype": None if self.dtype == "bfloat16" else self.dtype,
        }


def layer_map(layers: Mapping[int, AttentionSpec], count: int) -> dict[str, Any]:
    """Specs per layer, of `count`, as recipe data: equal ones under one key, in the order of their first layer."""
    found: dict[str, tuple[Any, list[int]]] = {}
    for layer in sorted(layers):
        data = to_data(layers[layer])
        key = json.dumps(_numbers(data), sort_keys=True)
        found.setdefault(key, (data, []))[1].append(layer)
    return {"*" if len(where) == count else spans(where): data for data, where in found.values()}


def size_data(video: Video) -> dict[str, Any]:
    """The size as recipe data, what was not given left out."""
    if video.grid is not None:
        return {"grid": list(video.grid)}
    data = {"width": video.width, "height": video.height, "frames": None if video.frames == 1 else video.frames}
    return {key: value for key, value in data.items() if value is not None}


def specs_of(value: Any) -> Iterator[Spec]:
    """Every registered part inside a spec, a mapping or a list of them, itself included."""
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Spec):
            yield value
        for one in fields(value):
            yield from specs_of(getattr(value, one.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from specs_of(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from specs_of(item)


def _step_key(one: StepRange) -> str:
    return str(one.first) if one.first == one.last else f"{one.first}-{one.last}"


def _numbers(data: Any) -> Any:
    """Data in which 5.0 and 5 are one number."""
    if isinstance(data, Mapping):
        return {key: _numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_numbers(value) for value in data]
    if isinstance(data, float) and data.is_integer():
        return int(data)
    return data
