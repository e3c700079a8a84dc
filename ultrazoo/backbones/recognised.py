"""Which backbone a loaded model is: every registered backbone of another library is asked, plugins last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .. import registry
from ..errors import RegistryError, UsageError
from .adapted import AdaptedSpec

NATIVE = {"wan": ("diffusers", "WanTransformer3DModel")}
"""Native backbones and the class that is the same model: their recipes hold for it when the sizes agree."""


def node_of(model: nn.Module, written: Any = None) -> dict[str, Any]:
    """The backbone node that a recipe for `model` has; `written` is the recipe's own node, None where it has none.

    Raises UsageError for a model that no backbone knows, with those that could not be asked.
    """
    failed: list[str] = []
    kinds = []
    for spec in _adapted(failed):
        own = _mapping(written)
        found = spec.recognise(model, own if own.get("name") == spec.name else {})
        if found is not None:
            return dict(found)
        kinds.append(spec.serves())
    rest = "".join(f"; {one}" for one in failed)
    raise UsageError(
        f"{type(model).__module__}.{type(model).__name__} has no adapter; adapters exist for {'; '.join(kinds)}; a plugin can "
        f"add one{rest}"
    )


def same(written: Any, node: Mapping[str, Any]) -> bool:
    """Whether a recipe whose backbone is `written` is for the model behind `node`."""
    own = _mapping(written)
    name = str(own.get("name"))
    if name == node["name"]:
        return bool(registry.find("backbone", name).same(own, node))
    return NATIVE.get(name) == (node["name"], node.get("model"))


def _mapping(written: Any) -> Mapping[str, Any]:
    if written is None:
        return {}
    return written if isinstance(written, Mapping) else {"name": written}


def _adapted(failed: list[str]) -> Iterator[type[AdaptedSpec]]:
    """Registered backbones of other libraries; a plugin that cannot be imported goes to `failed` with its reason."""
    for entry in sorted(registry.entries("backbone"), key=lambda one: not one.builtin):
        try:
            found = registry.find("backbone", entry.name)
        except RegistryError as error:
            failed.append(str(error))
            continue
        if isinstance(found, type) and issubclass(found, AdaptedSpec):
            yield found
