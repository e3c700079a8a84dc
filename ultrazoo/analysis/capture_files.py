"""A capture on the disk: one safetensors file per sample, sampling step and layer, and an index ``capture.json``.

A file holds q, k and v (B, N, heads, D) as they go into the softmax (normed, rotated); with tokens beside the grid also
``extra_q``, ``extra_k``, ``extra_v`` (B, M, heads, D) and ``extra_mask`` (B, M); ``timestep``, ``key_valid`` (B, N) and the
block's input ``x`` (B, N, C) where they were there. ``host-*.safetensors`` hold a layer's projections and norms, for designs
that project something else than the block's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import OutputError, UsageError, listed
from ..grid import Grid
from ..spec import Rope, Segment, Site
from ..weights.disk import disk_errors
from ..weights.staging import staged_file
from ..weights.tensors import Entry
from ..weights.writer import order, write_file

INDEX = "capture.json"
VERSION = 1
KEY = "ultrazoo_capture"
SHIPPED = ("shapes",)
"""Captures inside the package, by name: `shapes` is of a toy Wan trained on moving shapes (benchmarks/shapes.py)."""


@dataclass(frozen=True)
class ModelFacts:
    """What a capture says about one model: `site` is that of its layer 0, at any grid.

    `turns`: whether `site.rope` and an item's coordinates say how q and k were rotated, so that other positions can be
    tried. `weights`: ``random`` where the model's numbers were still those that it starts with, else ``loaded``.
    """

    model: str
    backbone: str
    groups: Mapping[str, int]
    site: Site
    turns: bool
    weights: str

    @property
    def layers(self) -> int:
        return sum(self.groups.values())

    def data(self) -> dict[str, Any]:
        site = self.site
        rope = None if site.rope is None else asdict(site.rope)
        return {
            "model": self.model,
            "backbone": self.backbone,
            "groups": dict(self.groups),
            "dim": site.dim,
            "heads": site.heads,
            "head_dim": site.head_dim,
            "qk_norm": site.qk_norm,
            "has_timestep": site.has_timestep,
            "rope": rope,
            "turns": self.turns,
            "weights": self.weights,
        }

    @staticmethod
    def of(data: Mapping[str, Any]) -> ModelFacts:
        rope = data["rope"]
        if rope is not None:
            trained = None if rope["trained"] is None else Grid(*rope["trained"])
            rope = Rope(tuple(rope["axes"]), rope["base"], rope["pairing"], trained)
        site = Site(
            dim=data["dim"],
            heads=data["heads"],
            head_dim=data["head_dim"],
            layers=sum(data["groups"].values()),
            qk_norm=data["qk_norm"],
            has_timestep=data["has_timestep"],
            rope=rope,
        )
        return ModelFacts(data["model"], data["backbone"], data["groups"], site, data["turns"], data["weights"])


@dataclass(frozen=True)
class Item:
    """One file: a layer at one forward. `step` is (index, count) of the sampler, None outside a sampling run.

    `coordinates`: what the rotary embedding calls index 0, 1, … of each axis; None is 0, 1, ….
    """

    file: str
    component: str
    sample: int
    step: tuple[int, int] | None
    layer: int
    grid: Grid
    batch: int
    dtype: str
    nbytes: int
    segments: tuple[Segment, ...] = ()
    coordinates: tuple[tuple[float, ...], ...] | None = None

    def data(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(data: Mapping[str, Any]) -> Item:
        segments = tuple(
            Segment(**{**one, "grid": None if one["grid"] is None else Grid(*one["grid"])}) for one in data["segments"]
        )
        places = data["coordinates"]
        return Item(
            **{
                **data,
                "step": None if data["step"] is None else (data["step"][0], data["step"][1]),
                "grid": Grid(*data["grid"]),
                "segments": segments,
                "coordinates": None if places is None else tuple(tuple(axis) for axis in places),
            }
        )


@dataclass(frozen=True)
class Capture:
    """An index: `request` is what was asked for, `heads` which heads of the model were kept, in order."""

    directory: Path
    request: Mapping[str, Any]
    models: Mapping[str, ModelFacts]
    heads: tuple[int, ...]
    inputs: bool
    items: tuple[Item, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the index."""
        hosts = (self.directory / file for file in self.hosts.values())
        return sum(item.nbytes for item in self.items) + sum(_size(file) for file in hosts)

    def whole(self, item: Item) -> bool:
        """Whether an item's file is there in full, and its layer's projections where they were kept."""
        host = self.hosts.get(host_key(item.component, item.layer))
        there = host is None or (self.directory / host).is_file()
        return there and _size(self.directory / item.file) == item.nbytes

    def with_item(self, item: Item) -> Capture:
        kept = [one for one in self.items if one.file != item.file]
        return replace(self, items=(*kept, item))

    def data(self) -> dict[str, Any]:
        return {
            KEY: VERSION,
            "complete": self.complete,
            "request": dict(self.request),
            "heads": list(self.heads),
            "inputs": self.inputs,
            "models": {name: one.data() for name, one in self.models.items()},
            "hosts": dict(self.hosts),
            "items": [one.data() for one in self.items],
        }

    def save(self) -> None:
        """Write the index, whole or not at all. Raises OutputError."""
        text = json.dumps(self.data(), indent=1) + "\n"
        place = self.directory / INDEX
        with staged_file(place, force=True) as new, disk_errors(place):
            new.write_text(text, encoding="utf-8")

    def tensors(self, item: Item) -> dict[str, Tensor]:
        """The tensors of an item. Raises UsageError for a file that is missing, cut or of another shape."""
        path = self.directory / item.file
        size = _size(path)
        if size != item.nbytes:
            raise UsageError(
                f"{path} {'is missing' if not size else f'has {size} bytes, the index says {item.nbytes}'}: run the capture "
                "again, it makes what is missing"
            )
        found = read_tensors(path)
        due = (item.batch, item.grid.tokens, len(self.heads), self.models[item.component].site.head_dim)
        for name in ("q", "k", "v"):
            got = tuple(found[name].shape) if name in found else "none"
            if got != due:
                raise UsageError(f"{path} is damaged: {name} is {got}, the index says (B, N, heads, D) = {due}")
        return found

    def host(self, component: str, layer: int) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Projections and norms of a layer, and how the norms work; None where they were not captured."""
        file = self.hosts.get(host_key(component, layer))
        if file is None:
            return None
        path = self.directory / file
        return read_tensors(path), read_notes(path)

    @staticmethod
    def load(directory: str | Path) -> Capture:
        """Read an index; a name of `SHIPPED` stands for the capture that comes with the package. Raises UsageError for a
        directory that holds none, or a damaged one."""
        place = Path(directory)
        if str(directory) in SHIPPED and not place.exists():
            place = Path(__file__).parent / "captures" / str(directory)
        path = place / INDEX
        if not path.is_file():
            why = "does not exist" if not place.exists() else f"holds no {INDEX}"
            raise UsageError(
                f"{place} is no capture: it {why}; `ultrazoo capture` makes one, and {listed(SHIPPED)} comes "
                "with the package"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is damaged: {error}") from error
        if not isinstance(data, dict) or data.get(KEY) != VERSION:
            got = data.get(KEY) if isinstance(data, dict) else type(data).__name__
            raise UsageError(f"{path} is no capture of version {VERSION}: {KEY} is {got!r}")
        try:
            return Capture(
                place,
                data["request"],
                {name: ModelFacts.of(one) for name, one in data["models"].items()},
                tuple(data["heads"]),
                data["inputs"],
                tuple(Item.of(one) for one in data["items"]),
                data["hosts"],
                data["complete"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def host_key(component: str, layer: int) -> str:
    return f"{component or 'model'}-l{layer:03d}"


def item_name(component: str, sample: int, step: int, layer: int) -> str:
    return f"{component or 'model'}-p{sample:03d}-s{step:03d}-l{layer:03d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> int:
    """Write a new file, staged beside its place and renamed; returns its bytes. Raises OutputError."""
    # a clone has strides of its own: a dimension of one may have any
    plain = {name: z.detach().cpu().clone(memory_format=torch.contiguous_format) for name, z in tensors.items()}
    entries = order([Entry(name, tuple(z.shape), z.dtype) for name, z in plain.items()])
    with staged_file(path, force=True) as new:
        written = write_file(new, entries, iter([(one.name, plain[one.name]) for one in entries]), metadata=notes)
    return written.nbytes


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}; run the capture again without it") from error


def read_notes(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def same_request(old: Capture, new: Mapping[str, Any]) -> None:
    """Raise OutputError where a directory holds a capture of something else, with every difference."""
    differ = [
        f"{key} was {old.request.get(key)!r}, asked for is {new.get(key)!r}"
        for key in dict.fromkeys([*old.request, *new])
        if old.request.get(key) != new.get(key)
    ]
    if differ:
        raise OutputError(f"{old.directory} holds another capture: {listed(differ)}; choose another place with -o")
