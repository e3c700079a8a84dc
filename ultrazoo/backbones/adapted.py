"""The backbone specs of models of other libraries: sites, sizes and costs from a config and an adapter; installing.

`AdaptedSpec` is what plugins subclass: with an `adapter` of their own, a model class of theirs takes recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import Problem, UltrazooError, UsageError
from ..grid import Grid
from ..options import FrozenMap
from ..spec import AttentionSpec, BackboneCost, BackboneSpec, Data, Site, Video, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from .adapter import Adapter
    from .geometry import Geometry
    from .session import Session

Steps = Sequence[tuple[int, int, Mapping[int, AttentionSpec]]]


@dataclass(frozen=True, kw_only=True)
class AdaptedSpec(BackboneSpec):
    """A model of another library, by its config. Subclasses say which adapter serves it and how it is made."""

    config: Data | None = option(None, "the model's settings, or the path of its config.json or folder")  # type: ignore[assignment]
    text_tokens: int | None = option(
        None, "text tokens that the cost counts; null means the model's usual number, which is 512 for most", ge=1
    )
    strides: tuple[int, int, int] | None = option(
        None, "strides of the VAE over (T, H, W), if not the usual ones", ge=1
    )

    adapted: ClassVar[bool] = True

    @classmethod
    def serves(cls) -> str:
        """Which models these are, for an error message about one that is none of them."""
        return cls.name

    @classmethod
    def recognise(cls, model: nn.Module, written: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The backbone node of a loaded `model`, as a recipe for it would have it; None for a model of another kind.

        `written` is the recipe's own backbone node, empty where it has none. Raises UsageError for a model of this kind
        that has no such node.
        """
        return None

    @classmethod
    def same(cls, written: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
        """Whether a recipe whose backbone is `written` is for the model whose node is `node`; both have this name."""
        return written.get("model") in (None, node.get("model"))

    def adapter(self) -> Adapter:
        """The adapter of this model's class."""
        raise TypeError(f"{type(self).__name__} has no adapter")

    def make(self) -> nn.Module:
        """The model with its parameters on the meta device and its buffers made."""
        raise TypeError(f"{type(self).__name__} cannot be made")

    def settings(self) -> Mapping[str, Any]:
        """The config with the class's defaults filled in."""
        assert isinstance(self.config, FrozenMap)
        return self.config

    def install(self, model: nn.Module, session: Session) -> None:
        """Put the session's attentions into `model`, in place."""
        from .forwards import install

        install(model, self, session)

    @property
    def geometry(self) -> Geometry:
        found = self.adapter().geometry(self.settings())
        return found if self.strides is None else replace(found, strides=self.strides)

    def settled(self, beside: Callable[[str, str], Path]) -> tuple[AdaptedSpec | None, str | None, list[Problem]]:
        return self.usual(), None, []

    def usual(self) -> Self:
        """This spec without a number of text tokens that is the usual one: both mean the same model."""
        same = self.text_tokens == self.adapter().text_tokens(self.settings())
        return replace(self, text_tokens=None) if same else self

    @property
    def words(self) -> int:
        """Text tokens that the cost counts."""
        return self.adapter().text_tokens(self.settings()) if self.text_tokens is None else self.text_tokens

    def problems(self, site: Site | None = None) -> list[Problem]:
        found = [one.under("config") for one in self.adapter().problems(self.settings())]
        if site is None or found:
            return found
        found = self.adapter().fits(self.settings(), site.grid, self.words)
        # a grid that is not known yet stands as one token, which models made for one size refuse
        if found or site.grid == Grid(1, 1, 1):
            return found
        try:
            _cost(self, site.grid)
        except Unrunnable as error:
            return [Problem("config", str(error))]
        return []

    def paths(self) -> list[str]:
        """Module path of every layer's attention, in execution order."""
        return [path for paths in self.adapter().paths(self.settings()).values() for path in paths]

    def groups(self) -> dict[str, int]:
        return {group: len(paths) for group, paths in self.adapter().paths(self.settings()).items()}

    def grid(self, video: Video) -> tuple[Grid | None, list[Problem]]:
        return self.geometry.grid(video)

    def sites(self, grid: Grid) -> tuple[Site, ...]:
        adapter, settings = self.adapter(), self.settings()
        site = adapter.site(settings).at(grid=grid, layers=self.layers)
        found: list[Site] = []
        for group, count in self.groups().items():
            extra = adapter.beside(settings, group, self.words)
            found += [site.at(layer=len(found) + i, extra=extra) for i in range(count)]
        return tuple(found)

    def cost(self, grid: Grid) -> BackboneCost:
        return _cost(self, grid)


class Unrunnable(UsageError):
    """A model whose settings cannot be read, that cannot be made, or whose own forward fails."""


@contextmanager
def own_errors(doing: str) -> Iterator[None]:
    """Errors of the library that the model is of, which may be of any kind, as `Unrunnable`."""
    try:
        yield
    except UltrazooError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Unrunnable(f"{doing}: {type(error).__name__}: {first[:200]}") from error


@cache
def _cost(spec: AdaptedSpec, grid: Grid) -> BackboneCost:
    """Counted by torch on the meta device: a forward of the model at `grid`, batch 1, its attentions left out.

    Elements are estimates: twice the stream for what lives across layers, five streams inside a layer (its widest hidden
    row), and 22 streams kept for a backward. Raises UsageError where the model cannot be made or run.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    adapter, settings = spec.adapter(), spec.settings()
    # without gradients: the counter looks for the history of every input of a module that wants one
    with own_errors(f"{adapter.model} cannot be made with these settings"):
        model = spec.make().to("meta").eval().requires_grad_(False)

    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, device="meta", dtype=dtype)

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    fails = f"{adapter.model}'s own forward fails at grid {grid} with {spec.words} text tokens"
    with own_errors(fails), torch.no_grad(), FlopCounterMode(display=False) as counter:
        adapter.count(model, adapter.inputs(settings, grid, 1, spec.words, make))
    counts = {name: sum(row.values()) for name, row in counter.get_flop_counts().items()}
    prefix = type(model).__name__

    def flops(path: str) -> int:
        # below the model's own name, or at the top where parts of it were run by themselves
        return counts.get(f"{prefix}.{path}", counts.get(path, 0))

    sites = spec.sites(grid)
    layers = tuple(
        adapter.layer_flops(settings, path, site, flops) for path, site in zip(spec.paths(), sites, strict=True)
    )
    inside = {path: flops(path) for path in {adapter.block(path) for path in spec.paths()}}
    stream = grid.tokens * sites[0].dim
    return BackboneCost(
        parameters=sum(p.numel() for p in model.parameters()),
        layer_flops=layers,
        outside_flops=counts["Global"] - sum(inside.values()),
        stream_elements=2 * stream,
        layer_peak_elements=(5 * stream,) * len(sites),
        layer_saved_elements=(22 * stream,) * len(sites),
    )


def build_adapted(spec: AdaptedSpec, attention: Sequence[AttentionSpec], grid: Grid, steps: Steps = ()) -> nn.Module:
    """The model of an adapted spec with its attentions in place: what `module(spec, attention, grid)` is of such specs."""
    from .session import Session

    model = spec.make()
    spec.install(model, Session(spec, attention, grid, steps))
    return model


def start_foreign(model: nn.Module) -> nn.Module:
    """Say how the parameters start that torch's own modules do not speak for: norms at 1, vectors at 0, tables small.

    Only a model built without weights needs it; a library's own random start cannot be had one parameter at a time.
    """
    from ..ops.init import Constant, Normal, Value, marked, value_of

    for module in model.modules():
        values: dict[str, Value] = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            try:
                value_of(module, name)
            except ValueError:
                scale = parameter.ndim == 1 and name == "weight"
                table = Normal(parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else Constant(0.0)
                values[name] = Constant(1.0) if scale else table
        if values:
            marked(module, **{**getattr(module, "ultrazoo_init", {}), **values})
    return model
