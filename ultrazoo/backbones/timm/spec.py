"""The backbone `timm`: a vision transformer of timm with our attentions in it, by the name and arguments of create_model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import Problem, UsageError, near
from ...grid import Grid
from ...options import FrozenMap, frozen, got
from ...spec import Data, Video, option
from ..adapted import AdaptedSpec, build_adapted, start_foreign
from ..folder import settings_at
from .facts import CLASSES, differences, read, settings, unsupported, written

if TYPE_CHECKING:
    from torch import nn

    from ..adapter import Adapter
    from ..session import Session

HINT = "write backbone: {name: timm, model: NAME, config: {…}} in the recipe, as timm.create_model(NAME, …) made it"


@dataclass(frozen=True, kw_only=True)
class TimmSpec(AdaptedSpec):
    """A vision transformer of timm. `pretrained` is a folder as timm's own hub has them, and brings its weights along."""

    name: ClassVar[str] = "timm"
    source: ClassVar[str] = "the timm library"
    module: ClassVar[Any] = staticmethod(build_adapted)
    minimal: ClassVar[Mapping[str, Any]] = {"model": "vit_tiny_patch16_224"}
    minimal_video: ClassVar[Mapping[str, int]] = {"width": 224, "height": 224}

    model: str = option("", "name of a model, such as deit3_small_patch16_224")
    config: Data | None = option(None, "arguments of timm.create_model; dynamic_img_size is true unless given")  # type: ignore[assignment]
    pretrained: str | None = option(None, "folder with timm's config.json and weights; instead of config")

    @classmethod
    def serves(cls) -> str:
        return f"{' and '.join(CLASSES)} of timm"

    @classmethod
    def recognise(cls, model: nn.Module, written: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if not type(model).__module__.startswith("timm."):
            return None
        if why := unsupported(model):
            raise UsageError(f"no adapter serves this model: {why}")
        held: Any = getattr(model, "pretrained_cfg", None) or {}
        name = written.get("model") or held.get("architecture")
        if not name:
            raise UsageError(f"this {type(model).__name__} does not say by which name timm made it; {HINT}")
        config = written.get("config")
        # a recipe may say anything: only what a recipe may have reaches timm
        spec, _, problems = cls(model=str(name), config=frozen(config)).settled(lambda _, path: Path(path))
        if spec is None:
            raise UsageError("; ".join(str(one.under("backbone")) for one in problems))
        if config is None:
            config = settings(model, _made(spec.model, FrozenMap()))
            # what is left out means any size when a model is built
            config.setdefault("dynamic_img_size", bool(model.dynamic_img_size))
        wrong = differences(model, _made(spec.model, frozen(config)))
        if wrong:
            raise UsageError(
                f"this {type(model).__name__} is not what timm.create_model({str(name)!r}, **{dict(config)}) makes: {wrong[0]} and "
                f"{len(wrong) - 1} more parts differ; {HINT}"
            )
        return {"name": cls.name, "model": str(name), "config": config}

    @classmethod
    def same(cls, written: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
        one, two = (str(each.get("model") or "").partition(".")[0] for each in (written, node))
        return one in ("", two)

    def settled(self, beside: Callable[[str, str], Path]) -> tuple[TimmSpec | None, str | None, list[Problem]]:
        timm = timm_library()
        if self.pretrained is not None:
            return self._brought(beside("pretrained", self.pretrained), beside)
        if not self.model:
            return None, None, [Problem("model", "the model is not named", "timm.list_models() lists the names")]
        if not timm.is_model(self.model):
            fix = near(self.model, timm.list_models()) or "timm.list_models() lists the names"
            return None, None, [Problem("model", f"timm {timm.__version__} has no model {got(self.model)}", fix)]
        config: Any = FrozenMap() if self.config is None else self.config
        if not isinstance(config, Mapping):
            return None, None, [Problem("config", f"expected arguments of timm.create_model, got {got(config)}")]
        if barred := sorted(set(config) & _own_arguments()):
            rule = "this argument of timm.create_model is not for recipes"
            return (
                None,
                None,
                [Problem(f"config.{one}", rule, "weights come from the recipe's `weights`") for one in barred],
            )
        config = frozen({"dynamic_img_size": True, **config})
        wrong = ""
        try:
            made = _made(self.model, config)
        except Exception as error:  # an argument may make timm raise anything
            wrong = f"timm cannot make {self.model}: {type(error).__name__}: {error}"
            # a model of another kind takes other arguments
            made = _made(self.model, FrozenMap())
        if why := unsupported(made):
            rule = f"no adapter serves {self.model}: {why}"
            return None, None, [Problem("model", rule, f"adapters serve {self.serves()}")]
        if wrong:
            return None, None, [Problem("config", wrong)]
        return replace(self, config=config).usual(), None, []

    def _brought(
        self, path: Path, beside: Callable[[str, str], Path]
    ) -> tuple[TimmSpec | None, str | None, list[Problem]]:
        """The model of the folder `path`, which brings its weights."""
        if self.config is not None:
            return None, None, [Problem("pretrained", "give either 'config' or 'pretrained', not both")]
        place, content, found = settings_at(path, "pretrained")
        if place is None:
            return None, None, found
        try:
            said, config = written(content)
        except ValueError as error:
            return None, None, [Problem("pretrained", f"{place} {error}")]
        if self.model.partition(".")[0] not in ("", said):
            rule = f"the recipe says {self.model!r}, the folder {said!r}"
            return None, None, [Problem("model", rule, "let one of them go")]
        settled, _, found = replace(self, model=said, config=frozen(config), pretrained=None).settled(beside)
        wrong = [replace(one, path="pretrained", rule=f"{place}, {one.path}: {one.rule}") for one in found]
        return settled, None if settled is None else str(place.parent), wrong

    def adapter(self) -> Adapter:
        from .vit import EvaAdapter, VitAdapter

        return (EvaAdapter if self.settings()["class"] == "Eva" else VitAdapter)(self.model)

    def settings(self) -> Mapping[str, Any]:
        assert isinstance(self.config, FrozenMap), "settled() comes first"
        return _facts(self.model, self.config)

    def grid(self, video: Video) -> tuple[Grid | None, list[Problem]]:
        grid, problems = super().grid(video)
        if grid is None:
            return None, problems
        facts = self.settings()
        if grid.t != 1:
            place = "grid" if video.grid is not None else "frames"
            return None, [Problem(place, f"{self.model} sees one image, got {grid.t} frames")]
        if not facts["dynamic"] and grid[1:] != facts["grid"]:
            high, wide = (n * p for n, p in zip(facts["grid"], facts["patch"], strict=True))
            rule = f"this model is made for images of {wide} x {high} pixels alone"
            fix = "create it with dynamic_img_size=True, or call model.set_input_size(img_size=(height, width)) first"
            return None, [Problem("grid" if video.grid is not None else "width", rule, fix)]
        return grid, []

    def make(self) -> nn.Module:
        import torch

        assert isinstance(self.config, FrozenMap)
        # the meta device is for parameters alone: tables hold numbers that nothing else could give
        with torch.device("cpu"):
            return start_foreign(_create(self.model, self.config))

    def install(self, model: nn.Module, session: Session) -> None:
        from ..forwards import install
        from .follow import FollowedVit

        install(model, self, session, FollowedVit)


def timm_library() -> Any:
    """timm. Raises UsageError where it cannot be imported."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm cannot be imported ({error}); pip install 'ultrazoo[timm]'") from error
    return timm


@cache
def _own_arguments() -> frozenset[str]:
    """What create_model takes for itself: weights, places to load from, ways to export."""
    rows = inspect.signature(timm_library().create_model).parameters.values()
    return frozenset(row.name for row in rows if row.kind is not row.VAR_KEYWORD)


@cache
def _made(model: str, config: FrozenMap) -> nn.Module:
    """The model with parameters on the meta device, for looking at; never handed out."""
    return _create(model, config)


@cache
def _facts(model: str, config: FrozenMap) -> FrozenMap:
    return FrozenMap(read(_made(model, config)))


def _create(model: str, config: Mapping[str, Any]) -> nn.Module:
    arguments = {key: tuple(value) if isinstance(value, tuple | list) else value for key, value in config.items()}
    with _large_on_meta():
        found: nn.Module = timm_library().create_model(model, pretrained=False, **arguments)
    for module in found.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _emptied(parameter)
    return found


SMALL = 1 << 16
"""Elements of a parameter that may be there while its model is made: tables are made where learned speeds are."""


def _emptied(parameter: nn.Parameter) -> nn.Parameter:
    import torch

    return torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


@contextmanager
def _large_on_meta() -> Iterator[None]:
    """While it is active, a large parameter goes to the meta device as soon as a module has it; buffers stay."""
    from torch import nn

    register = nn.Module.register_parameter

    def moved(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        large = parameter is not None and parameter.numel() > SMALL
        register(self, name, _emptied(parameter) if large else parameter)  # type: ignore[arg-type]

    nn.Module.register_parameter = moved  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
