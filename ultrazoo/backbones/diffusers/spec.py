"""The backbone `diffusers`: a transformer class of diffusers with our attentions in it, from its config or a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import Problem, UsageError, listed, near
from ...options import FrozenMap, frozen, got
from ...spec import option
from ..adapted import AdaptedSpec, Unrunnable, build_adapted, own_errors, start_foreign
from ..folder import settings_at
from . import ADAPTERS, adapter_named, class_name_of

if TYPE_CHECKING:
    from torch import nn

    from ..adapter import Adapter
    from ..session import Session

PIPELINE = ("transformer",)
"""Where a pipeline's folder keeps its model."""


@dataclass(frozen=True, kw_only=True)
class DiffusersSpec(AdaptedSpec):
    """A diffusers transformer. `pretrained` is a model's folder, or a pipeline's, and brings its weights along."""

    name: ClassVar[str] = "diffusers"
    source: ClassVar[str] = "the diffusers library"
    module: ClassVar[Any] = staticmethod(build_adapted)
    minimal: ClassVar[Mapping[str, Any]] = {"model": "WanTransformer3DModel"}

    model: str = option("", "the class, such as WanTransformer3DModel; a config says it too")
    pretrained: str | None = option(None, "folder with config.json and weights; instead of config")

    @classmethod
    def serves(cls) -> str:
        return f"{listed(ADAPTERS)} of diffusers"

    @classmethod
    def recognise(cls, model: nn.Module, written: Mapping[str, Any]) -> Mapping[str, Any] | None:
        name = class_name_of(model)
        if name is None:
            return None
        config: Any = model.config
        # plain JSON: what a loaded config holds beside it (tuples, dtypes) has no other spelling in a recipe
        kept = {key: value for key, value in dict(config).items() if not key.startswith("_")}
        return {"name": cls.name, "model": name, "config": json.loads(json.dumps(kept, default=str))}

    def settled(self, beside: Callable[[str, str], Path]) -> tuple[DiffusersSpec | None, str | None, list[Problem]]:
        if self.pretrained is not None and self.config is not None:
            return None, None, [Problem("pretrained", "give either 'config' or 'pretrained', not both")]
        key = "config" if self.pretrained is None else "pretrained"
        written: Any = self.config if self.pretrained is None else self.pretrained
        brought = None
        content: Any = written if written is not None else FrozenMap()
        if isinstance(written, str):
            place, content, found = settings_at(beside(key, written), key, PIPELINE)
            if place is None:
                return None, None, found
            brought = str(place.parent) if self.pretrained is not None else None
        if not isinstance(content, Mapping):
            return None, None, [Problem(key, f"expected settings or a path, got {got(content)}")]
        model, found = self._class(content, key)
        if found:
            return None, None, found
        kept = {name: value for name, value in content.items() if not name.startswith("_")}
        spec = replace(self, model=model, config=frozen(kept), pretrained=None)
        try:
            with own_errors(f"settings that {model} cannot have"):
                spec.paths(), spec.geometry, spec.adapter().site(spec.settings())
                return spec.usual(), brought, []
        except Unrunnable as error:
            return None, None, [Problem(key, str(error))]

    def _class(self, content: Mapping[str, Any], key: str) -> tuple[str, list[Problem]]:
        """The class named by `model` or by the config, or a problem."""
        said = content.get("_class_name", self.model)
        if self.model and said != self.model:
            return "", [Problem("model", f"the recipe says {self.model!r}, the config {said!r}", "let one of them go")]
        if not said:
            return "", [Problem("model", "the class is not said", f"adapters exist for {listed(ADAPTERS)}")]
        if said not in ADAPTERS:
            where = "model" if self.model else key
            fix = near(str(said), ADAPTERS) or f"adapters exist for {listed(ADAPTERS)}; a plugin can add one"
            return "", [Problem(where, f"no adapter for class {got(said)}", fix)]
        unknown = sorted(set(content) - set(_defaults(said)) - {one for one in content if one.startswith("_")})
        return said, [
            Problem(f"{key}.{one}", f"{said} has no setting {one!r}", near(one, _defaults(said))) for one in unknown
        ]

    def adapter(self) -> Adapter:
        return adapter_named(self.model)

    def settings(self) -> Mapping[str, Any]:
        assert isinstance(self.config, Mapping), "settled() comes first"
        return {**_defaults(self.model), **self.config}

    def make(self) -> nn.Module:
        import torch
        from accelerate import init_empty_weights

        cls = diffusers_class(self.model)
        # buffers and plain tensors (rotary tables) hold numbers that nothing else could give
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            made: nn.Module = cls.from_config(_plain(self.config))
        return start_foreign(made)

    def install(self, model: nn.Module, session: Session) -> None:
        from .install import install

        install(model, self, session)


def diffusers_class(name: str) -> Any:
    """A model class of the installed diffusers. Raises UsageError where there is none."""
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"diffusers cannot be imported ({error}); pip install 'ultrazoo[diffusers]'") from error
    found = getattr(diffusers, name, None)
    if found is None:
        raise UsageError(f"diffusers {diffusers.__version__} has no class {name}; upgrade it")
    return found


@cache
def _defaults(model: str) -> dict[str, Any]:
    """Settings of a class and their defaults, as its constructor declares them."""
    import inspect

    signature = inspect.signature(diffusers_class(model).__init__)
    return {
        name: frozen(row.default)
        for name, row in signature.parameters.items()
        if name != "self" and row.kind in (row.POSITIONAL_OR_KEYWORD, row.KEYWORD_ONLY)
    }


def _plain(data: Any) -> Any:
    """Frozen data as the lists and dicts that JSON would give."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_plain(value) for value in data]
    return data
