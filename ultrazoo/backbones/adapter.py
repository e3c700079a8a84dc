"""How a model class of another library is reached: what an adapter declares, and the facts of one forward.

An adapter knows attribute names, sizes and argument names of one class; it owns no numbers. `Installed` stands between
the model's forward and our attentions: it learns grid and timestep when the forward begins and hands every attention its
own `Call`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.contract import Call, Extra, Positions
from ..attention.full import dense_cost
from ..errors import Problem, UsageError
from ..grid import Grid
from ..spec import Segment, Site
from .geometry import Geometry
from .layers import traced
from .session import Session

Config = Mapping[str, Any]
"""A model's settings as its ``config.json`` holds them."""


TEXT_TOKENS = 512
"""Text tokens of a prompt, for models that take any number."""


@dataclass(frozen=True)
class Frame:
    """The facts of one forward.

    `timestep` on the 0..1000 scale, 1000 is pure noise. `start`: the row of the visual sequence at which the grid's
    tokens begin. `coordinates`: what the rotary embedding calls index 0, 1, … of each axis; None is 0, 1, …. `own`:
    whatever else the adapter's processors need.
    """

    grid: tuple[int, int, int]
    timestep: Tensor | None = None
    start: int = 0
    coordinates: tuple[Tensor, Tensor, Tensor] | None = None
    own: Any = None
    step: tuple[int, int] | None = None
    branch: str | None = None

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    def physical(self, positions: Positions) -> Positions:
        """`positions` of the grid as the model's rotary embedding counts them; between two tokens, in proportion."""
        if self.coordinates is None:
            return positions
        t, h, w = (
            _between(values, at)
            for values, at in zip(self.coordinates, (positions.t, positions.h, positions.w), strict=True)
        )
        return positions._replace(t=t, h=h, w=w)


@dataclass(frozen=True)
class Part:
    """Where a host's attention keeps the numbers of one projection: the path of a parameter inside it, and the rows and the
    columns (first, past the last) that are the projection's; None means all. Without a `place` the host has no such
    projection and hands on what it is given."""

    place: str | None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The projection's own numbers of the whole `parameter`."""
        if self.rows is not None:
            parameter = parameter[slice(*self.rows)]
        # a bias has none
        if self.columns is not None and parameter.ndim > 1:
            parameter = parameter[:, slice(*self.columns)]
        return parameter


def _between(values: Tensor, at: Tensor) -> Tensor:
    """(n,) coordinates of index 0, 1, …, read at fractional places (m,), straight on past both ends."""
    values, at = values.to(at.device, torch.float64), at.to(torch.float64)
    if values.shape[0] == 1:
        return values + at
    low = at.floor().clamp(0, values.shape[0] - 2)
    here = low.long()
    share = at - low
    return torch.lerp(values[here], values[here + 1], share)


class Adapter:
    """One model class. Subclasses declare; every method takes the model's config.

    `model` is the class's name. `softmax`: whether the model's own attention is softmax attention, so that `full` equals
    it. `companions` says which rows beside the grid take part in attention and how, for reports.
    """

    model: ClassVar[str]
    softmax: ClassVar[bool] = True
    streams: ClassVar[str] = "none"

    def paths(self, config: Config) -> dict[str, list[str]]:
        """Module paths of the visual self-attentions in execution order, by group of layers."""
        raise NotImplementedError

    def geometry(self, config: Config) -> Geometry:
        """Strides of the VAE that the model was trained with, and the model's patch."""
        raise NotImplementedError

    def site(self, config: Config) -> Site:
        """Dimensions and rotary embedding, the same for every layer; layer numbers and grid are filled in."""
        raise NotImplementedError

    def beside(self, config: Config, group: str, text_tokens: int) -> tuple[Segment, ...]:
        """Rows beside the grid that take part in the attentions of `group`, for the cost."""
        return ()

    def problems(self, config: Config) -> list[Problem]:
        """Settings that the adapter cannot serve, paths relative to the config."""
        return []

    def text_tokens(self, config: Config) -> int:
        """Text tokens that the cost counts where a recipe does not say how many."""
        return TEXT_TOKENS

    def fits(self, config: Config, grid: Grid, text_tokens: int) -> list[Problem]:
        """What the model cannot run at this size, paths relative to the backbone: `text_tokens`, ``config.…``."""
        return []

    def frame(self, config: Config, arguments: Mapping[str, Any]) -> Frame:
        """The facts of a forward called with `arguments`, by name, defaults included."""
        raise NotImplementedError

    def processor(self, group: str) -> type[nn.Module]:
        """The class that runs an attention in place of the stock processor: ``cls(attention, layer, installed)``."""
        raise NotImplementedError

    def block(self, path: str) -> str:
        """Module path of the block around the attention at `path`."""
        return path.rpartition(".")[0]

    def layer_flops(self, config: Config, path: str, site: Site, flops: Callable[[str], int]) -> int:
        """FLOPs of a layer beside its grid's attention and projections; ``flops(path)`` is what a module counted."""
        return flops(self.block(path)) - dense_cost(site).flops

    def count(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Run `model` on the meta device, for its FLOPs."""
        model(**arguments)

    def inputs(self, config: Config, grid: Grid, batch: int, text_tokens: int, make: Callable[..., Tensor]) -> Any:
        """Arguments of a forward over `grid`; ``make(*shape)`` gives a tensor."""
        raise NotImplementedError


class Installed:
    """What stands between one model and our attentions in it. It holds no module and no parameter."""

    def __init__(self, adapter: Adapter, config: Config, session: Session):
        self.adapter, self.config, self.session = adapter, config, session
        self.frame: Frame | None = None

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins (forward pre-hook with keywords)."""
        bound = _signature(type(model)).bind(model, *args, **kwargs)
        bound.apply_defaults()
        self.begin(self.adapter.frame(self.config, bound.arguments))
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                self._remember(module)

    def begin(self, frame: Frame) -> None:
        """What follows belongs to `frame`. Raises SiteError where the recipe cannot run at its grid."""
        if not traced():
            self.session.require(Grid(*frame.grid))
        self.frame = replace(frame, step=self.session.step, branch=self.session.branch)

    def leave(self, *_: Any) -> None:
        """A forward has ended, well or not (forward hook)."""
        self.frame = None

    def call(self, layer: int, extra: Extra | None) -> tuple[Frame, Call]:
        """Frame and call of one layer. Raises UsageError outside a forward of the model."""
        frame = self.frame
        if frame is None:
            raise UsageError(
                f"layer {layer} of {self.adapter.model} was run outside a forward of the model, which alone says grid and "
                "timestep; checkpoint blocks with the model's enable_gradient_checkpointing(), not with a wrapper"
            )
        state = self.session.state_of(layer)
        return frame, Call(frame.grid, frame.timestep, extra, step=frame.step, branch=frame.branch, state=state)

    def _remember(self, module: nn.Module) -> None:
        """Make `module`'s checkpointing function keep the frame for the recomputation, where it does not yet."""
        stock = getattr(module, "_gradient_checkpointing_func", None)
        if stock is None or isinstance(stock, _Remembering):
            return
        module._gradient_checkpointing_func = _Remembering(self, stock)  # type: ignore[assignment]

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Give every module of `model` its own checkpointing function back."""
        for module in model.modules():
            held = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(held, _Remembering):
                module._gradient_checkpointing_func = held.stock  # type: ignore[assignment]


class _Remembering:
    """A checkpointing function whose recomputation sees the frame of its own forward, whatever ran in between."""

    def __init__(self, installed: Installed, stock: Callable[..., Any]):
        self.installed, self.stock = installed, stock

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = self.installed.frame

        @functools.wraps(function.__call__ if isinstance(function, nn.Module) else function)
        def again(*inputs: Any, **more: Any) -> Any:
            before, self.installed.frame = self.installed.frame, frame
            try:
                return function(*inputs, **more)
            finally:
                self.installed.frame = before

        return self.stock(again, *args, **kwargs)


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)
